"""The MLX port: training and sampling on Apple silicon and CPUs; averages of the weights of any module.

``load`` is here and in :mod:`backends.mlx.api`, beside ``sample`` and ``train``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """``load``, on first use: importing this package imports no MLX."""
    if name == "load":
        from .api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
