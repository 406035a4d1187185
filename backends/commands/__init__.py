"""Commands that need no framework: ``edm2 NAME``."""
