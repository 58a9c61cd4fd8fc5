"""What each part of a model costs on this machine: models of random weights, measured as a benchmark measures them."""
