"""Models, data and plans: everything that decides what to prune and writes the pruned checkpoint."""
