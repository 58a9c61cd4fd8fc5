"""From a model to a pruned checkpoint: the budget, the search, the cut and the compensation."""
