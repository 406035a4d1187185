"""How good images are: their features, statistics of these, and metrics of the statistics."""
