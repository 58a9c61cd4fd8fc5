"""One module for each family, imported when a model of it is loaded: what vLLM changes in one stops no other."""
