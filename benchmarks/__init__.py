"""Speed and memory, measured side by side and reported as ratios. Not tests: run them by hand on a quiet machine."""
