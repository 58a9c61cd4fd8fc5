"""What a search or a limit looks at: perplexity, divergence, or a person's own questions or function."""
