"""The table of issue 20, row by row: what each accident does now."""
