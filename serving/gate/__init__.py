"""Promote, wait or roll back: a canary judged by its servers' metrics."""
