"""One module per command of ``sentei``."""
