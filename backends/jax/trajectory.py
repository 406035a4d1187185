"""Sampling as one compiled program: the steps of :func:`edm2_core.sampler.sample` in a scan, whatever their number.

An iteration is one evaluation of the denoiser, so that the network is compiled once; with 32 Heun steps there are 63.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backends import ports
from edm2_core import sampler
from edm2_core.sampler import StepSizes

from .denoiser import SamplingDenoiser

Guided = Literal["never", "sometimes", "always"]


class Evaluation(NamedTuple):
    """What an evaluation is told; in a schedule, arrays of the values of all evaluations."""

    sigma: Any
    size: Any  # of the step that it belongs to: the difference of two noise levels
    guidance: Any  # 1 where the guide has no effect
    churn: Any  # factor of the fresh noise that is added first
    corrects: Any  # it is the second of a Heun step
    ends: Any  # it is the last of its step
    fresh: Any  # index of the fresh noise


def sample(
    net: SamplingDenoiser,
    noise: Array,
    labels: Array | None = None,
    /,
    *,
    condition: Array | None = None,
    guide: SamplingDenoiser | None = None,
    guidance: float = 1.0,
    guide_interval: tuple[float, float] = (0.0, inf),
    joint: bool = False,
    churn_noise: Iterable[Array] | None = None,
    callback: Any = None,
    **options: Any,
) -> Array:
    """:func:`backends.ports.sample`, compiled for each shape and number of steps; with a callback, step by step."""
    given: dict[str, Any] = {"condition": condition, "guide": guide, "guidance": guidance}
    if callback is not None:
        options |= {"guide_interval": guide_interval, "joint": joint, "churn_noise": churn_noise, "callback": callback}
        images: Array = ports.sample(net, noise, labels, **given, **options)
        return images
    ports.check_sampling(net, noise, labels, **given)
    steps = sampler.step_sizes(**options)
    source = iter(churn_noise if churn_noise is not None else ())
    drawn = [sampler.next_churn(source) for step in steps if step.churn is not None]
    fresh = jnp.stack(drawn) if drawn else None
    schedule = evaluations(steps, guidance, guide_interval, dtype=jnp.promote_types(noise.dtype, jnp.float32))
    acts = set(schedule.guidance != 1)
    guided: Guided = "sometimes" if len(acts) == 2 else "always" if acts == {True} else "never"
    networks = net, None if guided == "never" else guide, labels, condition
    return _trajectory(networks, noise * steps[0].level, schedule, fresh, guided, joint)


def evaluations(steps: list[StepSizes], guidance: float, interval: tuple[float, float], *, dtype: Any) -> Evaluation:
    """The schedule of ``steps``, with numbers in ``dtype``."""
    rows, drawn = [], 0
    for step in steps:
        for corrects in (False, True) if step.corrected else (False,):
            sigma, ends = step.target if corrects else step.sigma, corrects or not step.corrected
            weight = guidance if interval[0] <= sigma <= interval[1] else 1.0
            churn = 0.0 if corrects or step.churn is None else step.churn
            numbers = np.array([sigma, step.target - step.sigma, weight, churn]).astype(dtype)
            rows.append((*numbers, corrects, ends, drawn))
            drawn += step.churn is not None and not corrects
    return Evaluation(*map(np.array, zip(*rows, strict=True)))


@partial(jax.jit, static_argnums=(4, 5))
def _trajectory(
    networks: Any, start: Array, schedule: Evaluation, fresh: Array | None, guided: Guided, joint: bool
) -> Array:
    net, guide, labels, condition = networks
    alone = ports.bound(net, labels, condition)

    def denoise(x: Array, now: Evaluation) -> Array:
        if guided == "never":
            return alone(x, now.sigma)
        if joint and guide is None:
            return choose(now, lambda: alone(x, now.sigma), partial(ports.bound_twice(net, labels, condition), x))
        denoised = alone(x, now.sigma)
        guiding = ports.bound(net, None, condition) if guide is None else ports.bound(guide, labels, condition)
        return choose(now, lambda: denoised, lambda sigma: (denoised, guiding(x, sigma)))

    def choose(now: Evaluation, unguided: Callable[[], Array], both: Callable[[Any], tuple[Array, Array]]) -> Array:
        def away() -> Array:
            denoised, guides = both(now.sigma)
            return guides + now.guidance * (denoised - guides)

        return away() if guided == "always" else lax.cond(now.guidance != 1, away, unguided)

    def evaluate(carry: Any, now: Evaluation) -> tuple[Any, None]:
        x, ahead, slope = carry  # images before the step; where the denoiser is evaluated; the slope at x
        if fresh is not None:
            added = fresh[now.fresh] * now.churn
            x, ahead = x + added, ahead + added
        own = (ahead - denoise(ahead, now).astype(x.dtype)) / now.sigma
        slope = jnp.where(now.corrects, (slope + own) / 2, own)
        ahead = x + slope * now.size
        return (jnp.where(now.ends, ahead, x), ahead, slope), None

    first: Any = (start.astype(schedule.sigma.dtype),) * 3  # the third, a slope, is set before it is used
    (x, *_), _ = lax.scan(evaluate, first, schedule)
    return x.astype(start.dtype)
