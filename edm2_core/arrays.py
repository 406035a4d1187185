"""Arrays of any library: their type, their namespace, and their way to the host and back.

Everything that the array API standard leaves open is here, once: Python floats, half precision, libraries without
float64, and MLX, which array-api-compat does not know but which names its own namespace.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, to_device


class Array(Protocol):
    """An array of any array API library: what this package asks of one.

    ``np.ndarray``, ``torch.Tensor``, ``jax.Array`` and ``mx.array`` are such arrays to a type checker. The other
    operand is an array of the same library or a Python number. Results are not ``Self``, because those of NumPy differ
    from their operands in the parameters for shape and dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, key: Any, /) -> "Array": ...
    def __neg__(self) -> "Array": ...
    def __add__(self, other: Any, /) -> "Array": ...
    def __radd__(self, other: Any, /) -> "Array": ...
    def __sub__(self, other: Any, /) -> "Array": ...
    def __rsub__(self, other: Any, /) -> "Array": ...
    def __mul__(self, other: Any, /) -> "Array": ...
    def __rmul__(self, other: Any, /) -> "Array": ...
    def __truediv__(self, other: Any, /) -> "Array": ...
    def __rtruediv__(self, other: Any, /) -> "Array": ...
    def __pow__(self, other: Any, /) -> "Array": ...
    def __lt__(self, other: Any, /) -> "Array": ...
    def __ge__(self, other: Any, /) -> "Array": ...


class Namespace(Protocol):
    """The functions of an array API library."""

    def finfo(self, dtype: Any, /) -> Any: ...
    def isdtype(self, dtype: Any, kind: Any, /) -> bool: ...
    def __array_namespace_info__(self) -> Any: ...
    def __getattr__(self, name: str, /) -> Callable[..., Array]: ...


A = TypeVar("A", bound=Array)
"""The caller's own array type: a function of tensors that returns ``A`` returns a tensor."""
Numbers = Array | float | Sequence[float]
"""The arguments of functions that compute on the host in float64."""
P = ParamSpec("P")


class Elementwise(Protocol[P]):
    """A function whose first argument may be a number, for which it returns a float."""

    @overload
    def __call__(self, x: float, /, *args: P.args, **kwargs: P.kwargs) -> float: ...
    @overload
    def __call__(self, x: A, /, *args: P.args, **kwargs: P.kwargs) -> A: ...


def is_array(value: object, /) -> bool:
    """Whether ``value`` is an array of any array API library."""
    return is_array_api_obj(value) or hasattr(value, "__array_namespace__")


def namespace(*values: Any) -> Namespace:
    """The array namespace shared by those of ``values`` that are arrays. Raises TypeError if they are mixed."""
    xp: Namespace = array_namespace(*(value for value in values if is_array(value)))
    return xp


def scalars_too(function: Callable[Concatenate[Any, P], Any], /) -> Elementwise[P]:
    """Let Python numbers stand wherever arrays may: they are computed in float64, and the result is a float."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if any(is_array(value) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        wide: Any = (np.asarray(value, np.float64) if isinstance(value, int | float) else value for value in args)
        return float(function(*wide, **kwargs))

    return wrapper


def widened(x: Array, /) -> Array:
    """``x`` in float32 if its own floating type is narrower, else ``x``: what norms and angles are computed in. A
    complex ``x`` is at least complex64 already."""
    xp = namespace(x)
    narrow = xp.isdtype(x.dtype, "real floating") and xp.finfo(x.dtype).bits < 32
    return xp.astype(x, xp.float32) if narrow else x


def in_dtype_of(like: A, x: Array, /) -> A:
    """``x``, of the library of ``like``, in its dtype."""
    return cast(A, x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype))


def to_host(x: Any, /) -> np.ndarray:
    """``x`` (an array of any library, or numbers) as a float64 NumPy array. Raises TypeError for a traced array."""
    if is_array(x) and not isinstance(x, np.ndarray | np.generic):
        x = to_device(x.detach(), "cpu") if hasattr(x, "detach") else x  # torch keeps arrays on a device and in a graph
    try:
        return np.asarray(x, dtype=np.float64)
    except RuntimeError:  # some libraries convert only what is on their default device
        home = namespace(x).__array_namespace_info__().default_device()
        return np.asarray(to_device(x, home), dtype=np.float64)


def from_host(x: np.ndarray, /, *, like: Any) -> Any:
    """``x`` in the library, dtype and device of ``like``; ``x`` itself where ``like`` is not an array."""
    if not is_array(like):
        return x
    xp = namespace(like)
    where = {} if isinstance(like, np.generic) or not hasattr(like, "device") else {"device": device(like)}
    return xp.asarray(x, dtype=like.dtype, **where)
