"""Framework-free code around a network: data, checkpoints, runs (options, training loop, sampling) and reports."""
