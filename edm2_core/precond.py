"""EDM preconditioning: how a network F becomes a denoiser D at any noise level.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                                        (Eq. 4)
"""

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


@scalars_too
def _sqrt(x: Array) -> Array:
    return namespace(x).sqrt(x)


@scalars_too
def _log(x: Array) -> Array:
    return namespace(x).log(x)
