"""The array libraries that edm2_core supports, as test parameters with readable ids."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from edm2_core.arrays import Array, is_array


@dataclass(frozen=True)
class Library:
    """An array library, and conversions into it."""

    name: str
    module: str
    halves: tuple[str, ...] = ()
    device: str | None = None  # other than the default one

    @property
    def xp(self) -> Any:
        return import_module(self.module)

    def array(self, values: Any, dtype: str | None = None) -> Array:
        """``values`` as an array that shares no memory with them."""
        values = np.array(values, copy=True)
        where = {"device": self.xp.Device(self.device)} if self.device else {}
        return self.xp.asarray(values, dtype=getattr(self.xp, dtype or str(values.dtype)), **where)

    def arrays(self, values: Any) -> Any:
        """The same for the values of a dict."""
        return {name: self.array(value) for name, value in values.items()}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, under jax.jit for JAX, where each operation would be compiled by itself."""
        return import_module("jax").jit(function) if self.name == "jax" else function


LIBRARIES = (
    Library("numpy", "numpy", ("float16",)),
    Library("strict", "array_api_strict"),
    Library("strict-device1", "array_api_strict", device="device1"),
    Library("narrow", "conformance.narrow", ("float16",)),
    Library("torch", "torch", ("float16", "bfloat16")),
    Library("jax", "jax.numpy", ("float16", "bfloat16")),
    Library("mlx", "mlx.core", ("float16", "bfloat16")),
)
WIDE = ("numpy", "strict", "torch")  # those with float64


def _absent(library: Library) -> pytest.MarkDecorator:
    root = library.module.partition(".")[0]
    return pytest.mark.skipif(find_spec(root) is None, reason=f"{root} is not installed")


# libraries that are not installed are skipped with a reason
each_library = pytest.mark.parametrize("library", [pytest.param(x, id=x.name, marks=_absent(x)) for x in LIBRARIES])
each_wide_library = pytest.mark.parametrize(
    "library", [pytest.param(x, id=x.name, marks=_absent(x)) for x in LIBRARIES if x.name in WIDE]
)
each_half = pytest.mark.parametrize(
    ("library", "dtype"),
    [pytest.param(x, half, id=f"{x.name}-{half}", marks=_absent(x)) for x in LIBRARIES for half in x.halves],
)


def to_numpy(x: Any) -> np.ndarray:
    """Any library's array, or a number, as NumPy float64. For comparisons only."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    if hasattr(x, "to_device"):
        x = x.to_device(import_module("array_api_strict").Device("CPU_DEVICE")) if "strict" in type(x).__module__ else x
    return np.asarray(x, dtype=np.float64)


def flat(result: Any) -> list[Any]:
    """The arrays of a result that is one array or a tuple of them."""
    return list(result) if isinstance(result, tuple) else [result]


def check_same_kind(result: Any, like: Array) -> None:
    """SPEC API-1: library, dtype and device are those of the input. Call it before comparing values."""
    for out in flat(result):
        assert is_array(out), f"wanted an array like {type(like)}, got {type(out)}"
        assert isinstance(out, np.ndarray | np.generic) if isinstance(like, np.ndarray) else type(out) is type(like)
        assert out.dtype == like.dtype, f"wanted {like.dtype}, got {out.dtype}"
        if hasattr(like, "device"):
            assert out.device == like.device
