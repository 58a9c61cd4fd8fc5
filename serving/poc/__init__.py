"""A proof of concept from a file: candidates are pruned, evaluated, exported and measured, step by step."""
