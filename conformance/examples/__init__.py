"""Ports written from docs/adding_a_port.md alone."""
