"""The PyTorch port: train, sample and average on CUDA, CPU and MPS.

``backends.torch.load`` is that of :mod:`.api`, imported at first use: importing this package loads no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load as load


def __getattr__(name: str) -> Any:
    if name == "load":
        from .api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
