"""Finished directories in: serve, generate, verify, benchmark, report. Kept free of imports: vLLM loads this package."""
