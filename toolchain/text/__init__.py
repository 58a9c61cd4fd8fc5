"""Text for calibration and evaluation: where it comes from, and how it becomes windows of tokens."""
