"""Models in memory: loaded, imported, cut, and run layer by layer."""
