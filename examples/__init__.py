"""Short scripts that a reader finishes in one sitting; each runs as ``python -m examples.NAME``."""
