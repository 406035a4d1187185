"""EDM2 as mathematics: pure functions over the array API standard, the network as data, and a float64 reference.

Nothing here imports a deep-learning framework. Import the module that you need: ``from edm2_core import ema, mp``.
"""

__version__ = "0.1.0"
