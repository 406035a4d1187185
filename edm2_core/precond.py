"""EDM preconditioning, by which any network F becomes a denoiser D at any noise level.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                                        (Eq. 4)

``denoise(backbone, x, sigma)`` computes it; the network may be ours or any other.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast, overload

from .arrays import A, Array, namespace, scalars_too

S = TypeVar("S", bound=Array | float)


class Preconditioning(NamedTuple, Generic[S]):
    """The four coefficients at one noise level, or at each of an array of them."""

    c_skip: S
    """Factor of the noisy input in the result."""
    c_out: S
    """Factor of the network's output in the result."""
    c_in: S
    """Factor of the network's input, which then has unit variance."""
    c_noise: S
    """The noise level as the network sees it, ln(sigma) / 4."""


@overload
def precondition(sigma: float, /, *, sigma_data: float = 0.5) -> Preconditioning[float]: ...
@overload
def precondition(sigma: A, /, *, sigma_data: float = 0.5) -> Preconditioning[A]: ...
def precondition(sigma: Array | float, /, *, sigma_data: float = 0.5) -> Preconditioning[Any]:
    """The coefficients of preconditioning at noise level ``sigma``, elementwise.

    Args:
        sigma: noise levels, positive; an array of any shape, or a number.
        sigma_data: standard deviation of the data.

    Returns:
        Four arrays like ``sigma``, or four floats for a number.

    Source: Eqs. 5-8. Departs from the paper: nothing.

    >>> precondition(0.5).c_skip
    0.5
    """
    variance = sigma * sigma + sigma_data**2
    root = _sqrt(variance)
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, _log(sigma) / 4)


def denoise(backbone: Callable[[A, A], A], x: A, sigma: A, /, *, sigma_data: float = 0.5) -> A:
    """D(x; sigma) of any network F.

    Args:
        backbone: F as a function ``(c_in x, c_noise)`` of arrays [N, ...] and [N], which returns one like the first.
        x: noisy inputs, [N, ...].
        sigma: their noise levels, [N, 1, ...], with as many axes as ``x``.
        sigma_data: standard deviation of the data.

    Returns:
        The denoised inputs, [N, ...], in the library, dtype and device of ``x``.

    Source: Eq. 4. Departs from the paper: nothing.

    >>> import numpy as np
    >>> x, sigma = np.ones((2, 3)), np.full((2, 1), 0.5)
    >>> denoise(lambda scaled, c_noise: scaled * 0, x, sigma)[0]  # a network that answers 0 leaves c_skip x
    array([0.5, 0.5, 0.5])
    """
    c = precondition(sigma, sigma_data=sigma_data)
    c_noise = namespace(sigma).reshape(c.c_noise, (-1,))  # [N, 1, ...] -> [N]
    answer = backbone(cast(A, x * c.c_in), cast(A, c_noise))
    return cast(A, c.c_skip * x + c.c_out * answer)


def join_condition(scaled: A, condition: A, /, *, sigma_data: float = 0.5, axis: int = 1) -> A:
    """The input of a network with an image-shaped condition: both, one after the other.

    Args:
        scaled: c_in x, [N, C, ...].
        condition: of the same shape but for its channels, in the units of the images.
        sigma_data: standard deviation of the data: the condition is divided by it, as c_in divides an image without
            noise, so that it has unit variance too.
        axis: of the channels.

    Returns:
        [N, C + condition's channels, ...], in the library of ``scaled``.

    Source: none, the paper has no such conditions; concatenation is usual (arXiv 2104.07636 Section 2).

    >>> import numpy as np
    >>> join_condition(np.ones((1, 2, 3, 3)), np.ones((1, 1, 3, 3)))[0, :, 0, 0]
    array([1., 1., 2.])
    """
    return cast(A, namespace(scaled).concat([scaled, condition / sigma_data], axis=axis))


@scalars_too
def _sqrt(x: Array, /) -> Array:
    return namespace(x).sqrt(x)


@scalars_too
def _log(x: Array, /) -> Array:
    return namespace(x).log(x)
