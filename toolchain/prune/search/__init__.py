"""2SSP's two stages: scores of FFN neurons, and the search for attentions."""
