"""How arrays are stored: averages in a dtype of choice, where it can hold them; all others as they are.

Complex arrays are stored as pairs of real and imaginary parts, on a last axis of 2.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from math import sqrt
from typing import Literal

import numkong
import numpy as np

from edm2_core.ema import StorageDtype
from edm2_core.errors import InputError

from .safetensors_io import BFLOAT16

LARGEST: Mapping[str, float] = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}
_INEXACT = 1e-3  # relative error, by subnormal numbers, from which a tensor is stored wider
_NORMAL = 2.0**-14  # least normal number of float16


def narrowed(values: np.ndarray, dtype: StorageDtype, /) -> np.ndarray:
    """Float32 ``values``, which ``dtype`` can hold, rounded to it: to the nearest, ties to even."""
    if dtype == "float32":
        return values
    values = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        return np.asarray(numkong.astype(values, dtype)).view(BFLOAT16)
    rounded = np.empty(values.shape, np.float16)  # NumPy is faster at finding memory,
    numkong.astype(values, dtype, out=rounded)  # and 40 times as slow at this
    return rounded


def fitting_dtype(values: np.ndarray, dtype: StorageDtype, /) -> Literal[StorageDtype, "float64"]:
    """``dtype`` if it can hold the real array ``values``, an average; otherwise a wider one.

    float16 cannot hold values beyond its range, nor a tensor that its subnormal numbers would change by more than 1e-3
    (norm of the difference over norm). Gains (0-d) are stored in float32 at least.
    """
    largest = _largest(values)
    if LARGEST["float32"] < largest < np.inf:
        return "float64"
    if values.ndim == 0 or largest > LARGEST[dtype]:
        return "float32"
    return "float32" if dtype == "float16" and _lost_to_subnormals(values) else dtype


def _is_ordinary(values: np.ndarray) -> bool:
    """Whether one pass shows that every dtype can hold ``values``: their norm, which no value exceeds, and which is NaN
    where one is, is neither large nor that of subnormal numbers."""
    least, largest = _NORMAL * sqrt(values.size), LARGEST["float16"] / 2
    with np.errstate(over="ignore", invalid="ignore"):
        return values.ndim > 0 and least <= float(np.linalg.norm(values.ravel())) < largest


def _largest(values: np.ndarray) -> float:
    """The largest absolute value, or NaN, without a second array."""
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def _lost_to_subnormals(values: np.ndarray) -> bool:
    norm = float(np.linalg.norm(values.ravel()))
    if norm >= _NORMAL * sqrt(values.size):
        return False  # errors of at most 2^-25 an element are below the limit
    rounded = narrowed(values.astype(np.float32), "float16").astype(np.float32)
    return float(np.linalg.norm((rounded - values).ravel())) > _INEXACT * norm


def stored_arrays(
    params: Iterable[tuple[str, np.ndarray]], /, *, kept: Collection[str], dtype: StorageDtype
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Named arrays as a file holds them, and the names of complex ones. Averages are in ``dtype`` or, where it cannot
    hold them, wider, which is logged once; whole numbers and arrays in ``kept`` are unchanged.

    Raises:
        InputError: a value that is NaN or infinite, which in an average means that training has diverged.
    """
    arrays, pairs, wider = {}, [], []
    for name, array in params:
        if np.iscomplexobj(array):
            pairs.append(name)
            array = as_pairs(array)
        if name not in kept and np.issubdtype(array.dtype, np.floating):
            if not (ordinary := _is_ordinary(array)):
                _check_finite(name, array)
            fitting = dtype if ordinary else fitting_dtype(array, dtype)
            if fitting != dtype and array.ndim:
                wider.append(name)
            array = array if fitting == "float64" else narrowed(array.astype(np.float32, copy=False), fitting)
        arrays[name] = array
    if wider:
        _say_wider(wider[0], len(wider) - 1, dtype)
    return arrays, pairs


def _check_finite(name: str, values: np.ndarray) -> None:
    if not (largest := _largest(values)) < np.inf:  # in this form it also catches NaN
        raise InputError(
            f"weights must be finite to be stored, got {largest:g} in {name}: training has diverged, begin again with "
            "a smaller learning rate"
        )


@cache
def _say_wider(name: str, others: int, dtype: str) -> None:
    also = f" and {others} others" if others else ""
    logging.getLogger("edm2").warning(f"stored in float32, because {dtype} cannot hold it: {name}{also}")


def as_pairs(array: np.ndarray, /) -> np.ndarray:
    """A complex array as real and imaginary parts, on a last axis of 2."""
    return np.stack([array.real, array.imag], axis=-1)


def as_complex(pairs: np.ndarray, /) -> np.ndarray:
    """The inverse of :func:`as_pairs`."""
    return np.asarray(pairs[..., 0] + 1j * pairs[..., 1], np.result_type(pairs.dtype, np.complex64))
