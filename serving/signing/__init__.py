"""Signatures over everything in an export, and what is said about it before it is signed."""
