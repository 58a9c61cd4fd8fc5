"""What a search or a limit looks at: perplexity, divergence, accuracy, or a person's own function."""
