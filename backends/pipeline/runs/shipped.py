"""The network that ships with edm2, for a first picture without training. examples/shipped_network.py makes it."""

from pathlib import Path

PATH = Path(__file__).with_name("shipped-digits.safetensors")
WHOSE = "the network that ships with edm2: handwritten digits, made by the default run (examples/shipped_network.py)"
