"""vLLM's own server, started with what a pruned checkpoint needs."""
