"""Benchmarks of speed and memory, reported as ratios. Run them by hand on an otherwise idle machine."""
