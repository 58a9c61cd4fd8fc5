"""Finished directories in: serve, generate, verify, benchmark, report. Imports nothing: vLLM loads it."""
