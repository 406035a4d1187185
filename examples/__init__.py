"""Short, complete scripts; each runs as ``python -m examples.NAME``."""
