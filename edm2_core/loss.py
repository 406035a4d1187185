"""The training objective: at which noise levels, with which weight, and with how much uncertainty.

    sigma ~ exp(N(P_mean, P_std^2))                                                                         (Eq. 16)
    L = lambda(sigma) / exp(u(sigma)) |D(y + n; sigma) - y|^2 + u(sigma)                                    (Eq. 21)

D may be any denoiser. Source: arXiv 2312.02696, and arXiv 2207.12598 for label dropout. None of the functions departs
from them.
"""

from typing import cast

from .arrays import A, Array, namespace, scalars_too

LARGEST_GRADIENT = 2.0**63
"""Elements of gradients of this magnitude and more are 0, as those that are not finite are: the mean of their squares,
which Adam keeps, would overflow float32, and the weight would never move again. Source: SPEC STEP-2."""


@scalars_too
def noise_level(normal: Array, /, *, P_mean: float = -0.4, P_std: float = 1.0) -> Array:
    """Noise levels sigma = exp(P_mean + P_std z) from standard normal draws z, elementwise.

    Shapes: any, kept. Floats give floats. Source: Eq. 16; the defaults are those of CONFIG B to G.

    >>> noise_level(0.4)
    1.0
    """
    return namespace(normal).exp(normal * P_std + P_mean)


@scalars_too
def weight(sigma: Array, /, *, sigma_data: float = 0.5) -> Array:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, elementwise.

    Shapes: any, kept. Floats give floats. Source: Eq. 15.

    >>> weight(0.5)
    8.0
    """
    product = sigma * sigma_data
    return (sigma * sigma + sigma_data**2) / (product * product)


def loss(denoised: A, images: A, sigma: Array, logvar: Array, /, *, sigma_data: float = 0.5) -> A:
    """The loss of each element, not reduced. Training takes the gradient of its sum, divided by N.

    Args:
        denoised: D(images + noise; sigma), [N, ...].
        images: [N, ...].
        sigma: noise levels, [N, 1, ...].
        logvar: the uncertainty u(sigma), [N, 1, ...]; zeros where none is learned.
        sigma_data: standard deviation of the data.

    Returns:
        [N, ...], in the library and dtype of ``denoised``. u is added once per element, as in the paper, so a sum over
        elements weighs it by their number.

    Source: Eq. 21.
    """
    error = denoised - images
    scale = weight(sigma, sigma_data=sigma_data) / namespace(logvar).exp(logvar)
    return cast(A, scale * (error * error) + logvar)


def drop_labels(labels: A, uniform: Array, /, *, probability: float) -> A:
    """The labels of a training batch, some of them dropped, so that the network also learns to do without.

    Args:
        labels: one-hot, [N, label_dim].
        uniform: a number within [0, 1) for each image, [N].
        probability: how likely a label is dropped; 0 returns ``labels`` unchanged.

    Returns:
        A new array like ``labels``, with zeros in the rows whose ``uniform`` is below ``probability``.

    Source: arXiv 2207.12598 Algorithm 1, where the zero row is the null token.

    >>> import numpy as np
    >>> drop_labels(np.eye(2), np.array([0.05, 0.7]), probability=0.1)
    array([[0., 0.],
           [0., 1.]])
    """
    xp = namespace(labels)
    return cast(A, xp.where((uniform < probability)[:, None], xp.zeros_like(labels), labels))
