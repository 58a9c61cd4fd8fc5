"""The pruning plan: what is removed from each layer, as files that a person can read and edit."""
