"""Which library do these arrays belong to, and how do they come to the host and back?

Everything that the array API standard leaves to the reader is here, once: Python floats, half precision, libraries
without float64, and MLX, which array-api-compat does not know but which names its own namespace.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, to_device

P = ParamSpec("P")
Array = Any  # an array of any array API library; the standard has no common base class


def is_array(value: Any, /) -> bool:
    return is_array_api_obj(value) or hasattr(value, "__array_namespace__")


def namespace(*values: Any) -> Any:
    """The array namespace shared by those of ``values`` that are arrays. Raises TypeError if they are mixed."""
    return array_namespace(*(value for value in values if is_array(value)))


def scalars_too(function: Callable[P, Any], /) -> Callable[P, Any]:
    """Let Python numbers come wherever arrays may: they are computed in float64 and a float goes back."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        if any(is_array(value) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        wide: Any = [np.asarray(value, np.float64) if isinstance(value, int | float) else value for value in args]
        return float(function(*wide, **kwargs))

    return wrapper


def widened(x: Array, /) -> Array:
    """``x`` in float32 if its own floating type is narrower, else ``x``: what norms and angles are computed in."""
    xp = namespace(x)
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def cast(x: Array, like: Array, /) -> Array:
    """``x`` in the dtype of ``like``."""
    return x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype)


def to_host(x: Any, /) -> np.ndarray:
    """``x`` (an array of any library, or numbers) as a float64 NumPy array. Raises TypeError for a traced array."""
    if is_array(x) and not isinstance(x, np.ndarray | np.generic):
        x = to_device(x.detach(), "cpu") if hasattr(x, "detach") else x  # torch keeps arrays on a device and in a graph
    try:
        return np.asarray(x, dtype=np.float64)
    except RuntimeError:  # some libraries convert only what is on their default device
        home = namespace(x).__array_namespace_info__().default_device()
        return np.asarray(to_device(x, home), dtype=np.float64)


def from_host(x: np.ndarray, /, *, like: Any) -> Array:
    """``x`` in the library, dtype and device of ``like``; as it is, where ``like`` is no array."""
    if not is_array(like):
        return x
    xp = namespace(like)
    where = {} if isinstance(like, np.generic) or not hasattr(like, "device") else {"device": device(like)}
    return xp.asarray(x, dtype=like.dtype, **where)
