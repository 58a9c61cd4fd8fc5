"""Other published methods, which remove whole attentions, FFNs or blocks."""
