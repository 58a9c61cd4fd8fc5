"""What a model is made of, by its config and family. Standard library only, for vLLM's plugin."""
