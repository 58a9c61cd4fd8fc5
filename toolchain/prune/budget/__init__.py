"""Where sparsity goes: between the two stages, and among the layers; and how much damage is allowed."""
