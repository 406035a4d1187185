"""The training objective: at which noise levels, with which weight, and with how much uncertainty.

sigma ~ exp(N(P_mean, P_std^2))                                                                         (Eq. 16)
L = lambda(sigma) / exp(u(sigma)) |D(y + n; sigma) - y|^2 + u(sigma)                                    (Eq. 21)
"""

from .arrays import Array, namespace, scalars_too


@scalars_too
def noise_level(normal: Array, /, *, P_mean: float = -0.4, P_std: float = 1.0) -> Array:
    """sigma from standard normal draws, elementwise. Source: Eq. 16; the defaults are CONFIG B to G's."""
    return namespace(normal).exp(normal * P_std + P_mean)


@scalars_too
def weight(sigma: Array, /, *, sigma_data: float = 0.5) -> Array:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. Source: Eq. 15."""
    product = sigma * sigma_data
    return (sigma * sigma + sigma_data**2) / (product * product)


def loss(denoised: Array, images: Array, sigma: Array, logvar: Array, /, *, sigma_data: float = 0.5) -> Array:
    """The loss of each element, not reduced. Source: Eq. 21, with u = ``logvar``.

    Shapes: ``denoised`` and ``images`` [N, C, H, W]; ``sigma`` and ``logvar`` [N, 1, 1, 1]. Departs from the paper:
    nothing; like there u is added once per element, so sums over elements weigh it by their number.
    """
    error = denoised - images
    return weight(sigma, sigma_data=sigma_data) / namespace(logvar).exp(logvar) * (error * error) + logvar
