"""From noise to images: Euler and Heun steps along the probability flow of any denoiser, with churn and guidance.

    dx/dsigma = (x - D(x; sigma)) / sigma

A denoiser is any function ``(x, sigma) -> denoised`` of an array and a float. 32 Heun steps make 63 evaluations, for
the last step, to sigma 0, is Euler's. Source: arXiv 2206.00364 Algorithm 2 and Eq. 5, as used in 2312.02696.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt
from typing import Literal

from .arrays import Array
from .errors import InputError

Denoiser = Callable[[Array, float], Array]


def noise_levels(
    num_steps: int, /, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """``num_steps`` noise levels from sigma_max down to sigma_min, and 0. Source: arXiv 2206.00364 Eq. 5.

    Raises:
        InputError: fewer than one step, or not 0 < sigma_min < sigma_max, or rho not positive.
    """
    if num_steps < 1 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise InputError(
            f"sampling needs num_steps >= 1, 0 < sigma_min < sigma_max and rho > 0, got num_steps {num_steps}, "
            f"sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}"
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / max(num_steps - 1, 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]


def guided(
    net: Denoiser, guide: Denoiser, /, *, guidance: float, interval: tuple[float, float] = (0.0, inf)
) -> Denoiser:
    """The denoiser guide + guidance (net - guide) where ``interval`` holds sigma, ``net`` elsewhere.

    The guide is any denoiser: the network without its label (classifier-free), a smaller one, a worse version of
    itself (autoguidance, arXiv 2406.02507). An interval is arXiv 2404.07724's. The guide is skipped where it has no
    effect (guidance 1, or sigma outside ``interval``).
    """

    def denoise(x: Array, sigma: float) -> Array:
        if guidance == 1 or not interval[0] <= sigma <= interval[1]:
            return net(x, sigma)
        away = guide(x, sigma)
        return away + guidance * (net(x, sigma) - away)

    return denoise


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step: ``x`` at noise level ``sigma``, and the denoised images that the step
    was taken with (at the level where it began)."""

    index: int
    sigma: float
    x: Array
    denoised: Array


class Stop(Exception):
    """Raised by a callback to end sampling; :func:`sample` returns the ``x`` of that step."""


Callback = Callable[[Step], Array | None]
"""Called after each step. Returns None, or an array that takes the place of ``x``; may raise :class:`Stop`."""


def sample(
    denoise: Denoiser,
    noise: Array,
    /,
    *,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigmas: Sequence[float] | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = inf,
    S_noise: float = 1.0,
    churn_noise: Iterable[Array] | None = None,
    method: Literal["heun", "euler"] = "heun",
    callback: Callback | None = None,
) -> Array:
    """Images from standard normal ``noise``, of its shape, library, dtype and device.

    Source: arXiv 2206.00364 Algorithm 2. Departs from the paper: nothing. Step sizes are computed in float64.

    Args:
        denoise: ``(x, sigma) -> denoised``, sigma a float.
        noise: standard normal, of any shape.
        num_steps, sigma_min, sigma_max, rho: of :func:`noise_levels`; not looked at where ``sigmas`` are given.
        sigmas: the noise levels themselves, decreasing; the last may be 0, and usually is. Sampling starts from
            ``noise * sigmas[0]``.
        S_churn: with S_churn > 0, each step at a level within [S_min, S_max] first raises the noise by a factor of at
            most sqrt(2), with the next array of ``churn_noise`` (standard normal, shaped like ``noise``) times S_noise.
        method: Heun's second-order steps, or Euler's.
        callback: see :data:`Callback`.

    Raises:
        InputError: as :func:`noise_levels`; ``sigmas`` that do not decrease; unknown method; or ``churn_noise`` ends
            before the steps that need it.
    """
    if method not in ("heun", "euler"):
        raise InputError(f"method must be 'heun' or 'euler', got {method!r}")
    if sigmas is None:
        levels = noise_levels(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    else:
        levels = _checked(sigmas)
    churn = min(S_churn / (len(levels) - 1), sqrt(2) - 1)
    fresh = iter(churn_noise if churn_noise is not None else ())
    x = noise * levels[0]
    for index, (level, target) in enumerate(pairwise(levels)):
        sigma = level
        if churn > 0 and S_min <= level <= S_max:
            sigma = level * (1 + churn)
            x = x + _next(fresh) * (S_noise * sqrt(sigma**2 - level**2))
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        ahead = x + slope * (target - sigma)
        if method == "heun" and target > 0:
            slope = (slope + (ahead - denoise(ahead, target)) / target) / 2
            ahead = x + slope * (target - sigma)
        x = ahead
        if callback is not None:
            try:
                changed = callback(Step(index, target, x, denoised))
            except Stop:
                return x
            x = x if changed is None else changed
    return x


def _checked(sigmas: Sequence[float]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    falls = all(high > low for high, low in pairwise(levels))
    if len(levels) < 2 or not falls or not levels[-1] >= 0 or levels[0] == inf:
        raise InputError(f"sigmas must be two or more finite levels, each below the one before, got {levels}")
    return levels


def _next(fresh: Iterator[Array]) -> Array:
    try:
        return next(fresh)
    except StopIteration:
        raise InputError(
            "S_churn > 0 needs one array of churn_noise for each step with churn: give more of them"
        ) from None
