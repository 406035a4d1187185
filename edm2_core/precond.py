"""EDM preconditioning: how any network F becomes a denoiser D at any noise level.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                                        (Eq. 4)
"""

from collections.abc import Callable
from typing import NamedTuple

from .arrays import Array, namespace, scalars_too


class Preconditioning(NamedTuple):
    c_skip: Array
    c_out: Array
    c_in: Array
    c_noise: Array


def precondition(sigma: Array, /, *, sigma_data: float = 0.5) -> Preconditioning:
    """c_skip, c_out, c_in and c_noise at noise level ``sigma``, elementwise. Source: Eqs. 5-8. Floats give floats."""
    variance = sigma * sigma + sigma_data**2
    root = _sqrt(variance)
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, _log(sigma) / 4)


def denoise(backbone: Callable[[Array, Array], Array], x: Array, sigma: Array, /, *, sigma_data: float = 0.5) -> Array:
    """D(x; sigma) of any network F: ``backbone(c_in x, c_noise)``. Source: Eq. 4.

    Shapes: x [N, ...]; sigma [N, 1, ...], with as many axes as x; c_noise [N]. Returns: like x.
    """
    c = precondition(sigma, sigma_data=sigma_data)
    return c.c_skip * x + c.c_out * backbone(x * c.c_in, namespace(sigma).reshape(c.c_noise, (-1,)))


@scalars_too
def _sqrt(x: Array) -> Array:
    return namespace(x).sqrt(x)


@scalars_too
def _log(x: Array) -> Array:
    return namespace(x).log(x)
