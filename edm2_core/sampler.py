"""From noise to images: Euler and Heun steps along the probability flow of any denoiser, with churn and guidance.

    dx/dsigma = (x - D(x; sigma)) / sigma

A denoiser is any function ``(x, sigma) -> denoised`` of an array and a float. 32 Heun steps take 63 evaluations,
because the last step, to sigma 0, is Euler's. Source: arXiv 2206.00364 Algorithm 2 and Eq. 5, as used in 2312.02696.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt
from typing import Any, Generic, Literal, TypedDict, Unpack, cast

from .arrays import A
from .errors import InputError

Denoiser = Callable[[A, float], A]
"""``(x, sigma) -> denoised``, of the shape of x; ``Denoiser[torch.Tensor]`` is one of tensors."""


def noise_levels(
    num_steps: int, /, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """``num_steps`` noise levels from sigma_max down to sigma_min, then 0.

    Source: arXiv 2206.00364 Eq. 5. Departs from the paper: nothing.

    Raises:
        InputError: fewer than one step, or not 0 < sigma_min < sigma_max, or rho not positive.

    >>> noise_levels(3, sigma_min=1, sigma_max=9, rho=2)
    [9.0, 4.0, 1.0, 0.0]
    """
    if num_steps < 1 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise InputError(
            f"sampling needs num_steps >= 1, 0 < sigma_min < sigma_max and rho > 0, got num_steps {num_steps}, "
            f"sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}"
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / max(num_steps - 1, 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]


def guided(
    net: Denoiser[A], guide: Denoiser[A], /, *, guidance: float, interval: tuple[float, float] = (0.0, inf)
) -> Denoiser[A]:
    """The denoiser ``guide + guidance (net - guide)``.

    Args:
        net: the denoiser that is guided.
        guide: any other: the network without its label (classifier-free guidance), a smaller network, or a worse
            version of the same (autoguidance, arXiv 2406.02507).
        guidance: 1 is ``net`` alone; larger values move further away from the guide.
        interval: noise levels, ends included, at which guidance acts (arXiv 2404.07724); ``net`` alone elsewhere.

    The guide is skipped where it has no effect (guidance 1, or sigma outside ``interval``).

    >>> guided(lambda x, sigma: 3.0, lambda x, sigma: 1.0, guidance=2.0)(0.0, 1.0)
    5.0
    """

    def denoise(x: A, sigma: float) -> A:
        if guidance == 1 or not interval[0] <= sigma <= interval[1]:
            return net(x, sigma)
        away = guide(x, sigma)
        return cast(A, away + guidance * (net(x, sigma) - away))

    return denoise


@dataclass(frozen=True)
class Step(Generic[A]):
    """What a callback receives after each step."""

    index: int
    """The number of the step, from 0."""
    sigma: float
    """The noise level that the step reached."""
    x: A
    """The noisy images at that level."""
    denoised: A
    """The denoiser's answer at the level where the step began."""


class Stop(Exception):
    """Raised by a callback to end sampling; :func:`sample` returns the ``x`` of that step."""


Callback = Callable[[Step[A]], A | None]
"""Called after each step. Returns None, or an array that takes the place of ``x``; may raise :class:`Stop`."""


@dataclass(frozen=True)
class StepSizes:
    """One step as numbers, float64: where it begins and ends, and how it is taken. See :func:`step_sizes`."""

    level: float
    """The noise level of x before the step."""
    churn: float | None
    """The factor of the fresh noise that is added first; None: none is."""
    sigma: float
    """The noise level after that, at which the denoiser is evaluated."""
    target: float
    """The noise level that the step reaches."""
    corrected: bool
    """Whether a second evaluation, at the target, corrects the step (Heun)."""


class StepOptions(TypedDict, total=False):
    """The options of :func:`step_sizes`."""

    num_steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    sigmas: Sequence[float] | None
    S_churn: float
    S_min: float
    S_max: float
    S_noise: float
    method: Literal["heun", "euler"]


def step_sizes(
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
    method: Literal["heun", "euler"] = "heun",
) -> list[StepSizes]:
    """The steps that :func:`sample` takes, in order, from the highest noise level to the lowest.

    Args:
        num_steps, sigma_min, sigma_max, rho: as in :func:`noise_levels`; ignored where ``sigmas`` are given.
        sigmas: the noise levels themselves, decreasing. The last is usually 0; above 0 the result is still noisy.
            Sampling starts from ``noise * sigmas[0]``.
        S_churn: above 0, each step from a level within [S_min, S_max] first raises the noise level by the factor
            1 + min(S_churn / steps, sqrt(2) - 1), with fresh noise times S_noise.
        method: ``"heun"`` is of second order, ``"euler"`` of first.

    Source: arXiv 2206.00364 Algorithm 2. Departs from the paper: nothing.

    Raises:
        InputError: as :func:`noise_levels`; ``sigmas`` that do not decrease or are fewer than two; an unknown method.

    >>> [(step.sigma, step.target, step.corrected) for step in step_sizes(sigmas=[5, 1, 0])]
    [(5.0, 1.0, True), (1.0, 0.0, False)]
    """
    if method not in ("heun", "euler"):
        raise InputError(f"method must be 'heun' or 'euler', got {method!r}")
    if sigmas is None:
        levels = noise_levels(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    else:
        levels = _checked(sigmas)
    factor = min(S_churn / (len(levels) - 1), sqrt(2) - 1)
    steps = []
    for level, target in pairwise(levels):
        sigma, churn = level, None
        if factor > 0 and S_min <= level <= S_max:
            sigma = level * (1 + factor)
            churn = S_noise * sqrt(sigma**2 - level**2)
        steps.append(StepSizes(level, churn, sigma, target, method == "heun" and target > 0))
    return steps


def sample(
    denoise: Denoiser[A],
    noise: A,
    /,
    *,
    churn_noise: Iterable[A] | None = None,
    callback: Callback[A] | None = None,
    **options: Unpack[StepOptions],
) -> A:
    """Images from standard normal ``noise``, by Heun's or Euler's steps from the highest noise level to the lowest.

    Args:
        denoise: ``(x, sigma) -> denoised``, sigma a float.
        noise: standard normal, of any shape.
        churn_noise: standard normal arrays of the shape of ``noise``, one for each step with churn.
        callback: called with a :class:`Step` after each step. Returns None, or an array that takes the place of ``x``;
            may raise :class:`Stop` to end sampling.
        options: those of :func:`step_sizes`, such as ``num_steps``, ``sigmas``, ``S_churn`` and ``method``.

    Returns:
        Images of the shape, library, dtype and device of ``noise``; after :class:`Stop`, the ``x`` of that step.

    Source: arXiv 2206.00364 Algorithm 2. Departs from the paper: nothing. Step sizes are computed in float64.

    Raises:
        InputError: as :func:`step_sizes`; or ``churn_noise`` ends before the steps that need it.

    >>> import numpy as np
    >>> data = np.array([1.0, -1.0])  # a distribution of one point, which its denoiser knows
    >>> sample(lambda x, sigma: data, np.array([0.3, 0.2]), num_steps=4)
    array([ 1., -1.])
    """
    steps = step_sizes(**options)
    fresh = iter(churn_noise if churn_noise is not None else ())
    x: Any = noise * steps[0].level
    for index, step in enumerate(steps):
        if step.churn is not None:
            x = x + next_churn(fresh) * step.churn
        denoised = denoise(x, step.sigma)
        slope = (x - denoised) / step.sigma
        ahead = x + slope * (step.target - step.sigma)
        if step.corrected:
            slope = (slope + (ahead - denoise(ahead, step.target)) / step.target) / 2
            ahead = x + slope * (step.target - step.sigma)
        x = ahead
        if callback is not None:
            try:
                changed = callback(Step(index, step.target, x, denoised))
            except Stop:
                break
            x = x if changed is None else changed
    return cast(A, x)


def _checked(sigmas: Sequence[float]) -> list[float]:
    """The noise levels as floats. Raises InputError unless there are two or more, finite, and decreasing."""
    levels = [float(sigma) for sigma in sigmas]
    falls = all(high > low for high, low in pairwise(levels))
    if len(levels) < 2 or not falls or not levels[-1] >= 0 or levels[0] == inf:
        raise InputError(f"sigmas must be two or more finite levels, each below the one before, got {levels}")
    return levels


def next_churn(fresh: Iterator[A]) -> A:
    """The next array of fresh noise. Raises InputError where there is none left."""
    try:
        return next(fresh)
    except StopIteration:
        raise InputError(
            "S_churn > 0 needs one array of churn_noise for each step with churn: give more of them"
        ) from None
