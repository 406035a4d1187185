"""An array library without float64, as on accelerators: NumPy behind a namespace that refuses it.

array-api-strict cannot imitate one. Here an operation that makes a float64 array raises, instead of returning float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np


class Array:
    """A NumPy array of any dtype but float64."""

    def __init__(self, values: np.ndarray):
        if values.dtype == np.float64:
            raise TypeError("this library has no float64: something computed in it")
        self._values = values

    def __array_namespace__(self, *, api_version: str | None = None) -> "Namespace":
        return xp

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._values, dtype)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size"):
            return getattr(self._values, name)
        raise AttributeError(name)

    @property
    def device(self) -> str:
        return "narrow"

    def __getitem__(self, key: Any) -> "Array":
        return Array(np.asarray(self._values[_bare(key)]))

    def __len__(self) -> int:
        return len(self._values)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Array, *others: Any) -> Any:
        return _wrapped(getattr(self._values, name)(*(_like(self, other) for other in others)))

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _side in ("", "r"):
        setattr(Array, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "invert"):
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))


def _bare(value: Any) -> Any:
    if isinstance(value, Array):
        return value._values
    return type(value)(map(_bare, value)) if isinstance(value, list | tuple) else value


def _like(array: Array, other: Any) -> Any:
    """Python numbers take the array's type, as in the standard."""
    return other if isinstance(other, int | float) else _bare(other)


def _wrapped(result: Any) -> Any:
    if isinstance(result, np.ndarray | np.generic):
        return Array(np.asarray(result))
    return tuple(map(_wrapped, result)) if isinstance(result, tuple | list) else result


class Namespace:
    """The standard's functions, without float64."""

    def __getattr__(self, name: str) -> Any:
        if name == "float64":
            raise AttributeError("this library has no float64")
        attribute = getattr(np, name)
        if not callable(attribute) or isinstance(attribute, type):
            return attribute

        @wraps(attribute)
        def function(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("device", None)
            result = attribute(*map(_bare, args), **{key: _bare(value) for key, value in kwargs.items()})
            return _wrapped(result)

        return function

    finfo = staticmethod(np.finfo)


xp = Namespace()
float32, float16 = np.float32, np.float16


def asarray(values: Any, *, dtype: Any = None) -> Array:
    return Array(np.asarray(_bare(values), dtype))
