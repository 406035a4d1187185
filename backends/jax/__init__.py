"""The JAX port: train, sample and average on CPU, GPU and TPU. Importing it loads no JAX.

``load(path)`` gives a network ready to use; :mod:`.api` has ``sample`` and ``train`` beside it.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":
        from .api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
