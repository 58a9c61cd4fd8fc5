"""Two benchmarks side by side: of two days, or of another tool."""
