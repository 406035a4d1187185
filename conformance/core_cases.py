"""The table of all public functions of edm2_core that take arrays: arguments to draw, a call, its tolerance.

test_libraries.py runs each row in every array library and compares with the same call on NumPy float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from edm2_core import codec, ema, loss, mp, precond, sampler

Draw = st.SearchStrategy[tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Case:
    """One call of one public function.

    The tolerance is ``growth`` x eps x ``scale``, where ``scale`` of the same arguments in float64 is the magnitude
    that rounding is relative to, by default that of the result. Libraries may flush subnormal numbers to zero:
    ``flushed`` is the largest factor by which the function multiplies one.
    """

    name: str
    clauses: tuple[str, ...]
    function: Callable[..., Any]
    arguments: Draw
    call: Callable[..., Any]
    growth: float
    scale: Callable[..., Any] | None = None
    flushed: float = 16.0

    @property
    def by_host(self) -> bool:
        """Whether the function computes in float64 on the host, wherever its arguments are."""
        return self.function.__module__.startswith("edm2_core.ema") and self.function not in (ema.start, ema.advance)

    @property
    def floor(self) -> float:
        return self.flushed * tolerance.TINY


def _images(*channels: int) -> Draw:
    n, c, h, w = draw.IMAGES
    return st.tuples(*(draw.numbers(n, extra or c, h, w) for extra in channels))


def _lengths(*shape: int, low: float = 0.01, high: float = 0.28) -> st.SearchStrategy[np.ndarray]:
    return draw.numbers(*shape, low=low, high=high)


def _magnitudes(call: Callable[..., Any]) -> Callable[..., Any]:
    """For calls linear in each argument with positive constants: the call on magnitudes sums magnitudes."""
    return lambda *arrays: call(*map(np.abs, arrays))


def _mp_cases() -> list[Case]:
    one, two, unequal = _images(0), _images(0, 0), _images(0, 5)
    row, pixel = tolerance.reduction(4 * 9), tolerance.reduction(draw.IMAGES[1])
    weight = st.tuples(draw.weights())
    gained = st.tuples(draw.weights(), draw.numbers(low=-3, high=3))
    angles = st.tuples(
        draw.numbers(3, low=-2, high=2), draw.numbers(5, low=-20, high=20), draw.numbers(5, low=0, high=7)
    )

    def blend(a: Any, b: Any) -> Any:
        return mp.mp_sum(a, b, t=0.3)

    def joined(a: Any, b: Any) -> Any:
        return mp.mp_cat(a, b, axis=1, t=0.3)

    def angle(x: np.ndarray, freqs: np.ndarray, phases: np.ndarray) -> np.ndarray:
        return sqrt(2) * (1 + np.abs(x[:, None] * freqs) + np.abs(phases))

    def tail(x: np.ndarray) -> np.ndarray:
        """Libraries that reduce the argument of exp(x) by one rounded product add an error of |x| eps / 2."""
        return np.abs(mp.mp_silu(x)) * (1 + np.maximum(-x, 0) / 16)

    cases = [
        Case("normalize", ("MP-1",), mp.normalize, one, mp.normalize, 4 + tolerance.reduction(6 * 24)),
        Case("normalize-pixel", ("MP-1",), mp.normalize, one, lambda x: mp.normalize(x, axis=1), 4 + pixel),
        Case("mp_silu", ("MP-2",), mp.mp_silu, one, mp.mp_silu, 8, tail, flushed=200.0),
        Case("silu", ("MP-2",), mp.silu, one, mp.silu, 8, lambda x: 0.596 * tail(x), flushed=200.0),
        Case("mp_sum", ("MP-3",), mp.mp_sum, two, blend, 4, _magnitudes(blend)),
        Case("mp_cat", ("MP-4",), mp.mp_cat, unequal, joined, 4),
        Case("mp_fourier", ("MP-5",), mp.mp_fourier, angles, mp.mp_fourier, 4, angle),
        Case("mp_weight", ("MP-6",), mp.mp_weight, weight, mp.mp_weight, 4 + row),
        Case("mp_weight-gain", ("MP-6",), mp.mp_weight, gained, lambda w, g: mp.mp_weight(w, gain=g), 6 + row),
        Case("force_weight_norm", ("MP-8",), mp.force_weight_norm, weight, mp.force_weight_norm, 4 + row),
    ]
    for mode in ("keep", "up", "down"):
        for taps in ((1, 1), (1, 3, 3, 1), (1, 2, 3, 4, 5, 6)):

            def resampled(x: Any, mode: Any = mode, taps: Any = taps) -> Any:
                return mp.resample(x, mode=mode, filter=taps)

            name = f"resample-{mode}-{''.join(map(str, taps))}"
            cases.append(Case(name, ("MP-9",), mp.resample, one, resampled, 8, _magnitudes(resampled)))
    return cases


def _ema_cases() -> list[Case]:
    lengths = st.tuples(_lengths(6))
    snapshots = st.tuples(_lengths(4, low=0.03, high=0.27))

    # d ln gamma / d ln s: gamma ~ 1 / s for short lengths, and gamma -> 0 linearly at the longest
    def slope(s: np.ndarray) -> np.ndarray:
        gamma = ema.sigma_rel_to_gamma(s)
        return 1 + np.abs(s / (ema.gamma_to_sigma_rel(gamma * (1 + 1e-6) + 1e-9) - s) * (gamma * 1e-6 + 1e-9))

    def update(s: Any) -> Any:
        return ema.beta(s, t_next=4.0, t_delta=0.5)

    # the exponent gamma + 1 amplifies the relative error of the base, and has an error of its own
    def exponent(s: np.ndarray) -> np.ndarray:
        return update(s) * (1 + ema.sigma_rel_to_gamma(s))

    def clock(t: Any) -> Any:
        return ema.beta(0.1, t_next=t + 3, t_delta=t)

    # 1 - t / (t + 3) cancels to 3 / (t + 3)
    def cancelled(t: np.ndarray) -> np.ndarray:
        return clock(t) * (1 + 8 * t / 3)

    def profile(s: Any) -> Any:
        return ema.profile(0.75, end_time=1.25, sigma_rel=s)

    def product(s: Any) -> Any:
        return ema.inner_product(time_a=0.75, sigma_rel_a=s, time_b=1.0, sigma_rel_b=0.1)

    def combined(s: Any) -> Any:
        return ema.coefficients(in_time=[1, 2, 3, 3.5], in_sigma_rel=s, out_time=[2.5, 3.5], out_sigma_rel=[0.1, 0.2])

    def errors(s: Any) -> Any:
        error = ema.reconstruction_error(in_time=[1, 2, 3, 4], in_sigma_rel=s, out_time=4, out_sigma_rel=[0.1, 0.2])
        return error.amplification, error.rounding

    def rebuilt(s: Any) -> Any:
        return ema.reconstructed_profile([0.5, 3], in_time=[1, 2, 3, 4], in_sigma_rel=s, out_time=4, out_sigma_rel=0.1)

    weights = st.tuples(draw.numbers(3, 4), draw.numbers(3, 4))

    def started(a: Any, b: Any) -> Any:
        return tuple(average["a"] for average in ema.start({"a": a, "b": b}).values())

    def advanced(a: Any, b: Any) -> Any:
        after = ema.advance(ema.start({"w": a}), {"w": b}, t_next=4.0, t_delta=0.5)
        return tuple(average["w"] for average in after.values())

    # an average lies between its old value and the weight, and its rounding is relative to the larger
    def magnitudes(a: Any, b: Any) -> Any:
        return (np.abs(a) + np.abs(b),) * 2

    exponents, times = (st.tuples(draw.numbers(6, low=low, high=1e4)) for low in (0, 1))
    return [
        Case("sigma_rel_to_gamma", ("EMA-1",), ema.sigma_rel_to_gamma, lengths, ema.sigma_rel_to_gamma, 16, slope),
        Case("gamma_to_sigma_rel", ("EMA-1",), ema.gamma_to_sigma_rel, exponents, ema.gamma_to_sigma_rel, 8),
        Case("beta", ("EMA-3",), ema.beta, lengths, update, 16, exponent),
        Case("beta-clock", ("EMA-3",), ema.beta, times, clock, 16, cancelled),
        Case("profile", ("EMA-2",), ema.profile, lengths, profile, 1),
        Case("inner_product", ("EMA-4",), ema.inner_product, lengths, product, 1),
        Case("start", ("EMA-3",), ema.start, weights, started, 1),
        Case("advance", ("EMA-3",), ema.advance, weights, advanced, 8, magnitudes),
        Case("coefficients", ("EMA-5",), ema.coefficients, snapshots, combined, 1),
        Case("reconstructed_profile", ("EMA-8",), ema.reconstructed_profile, snapshots, rebuilt, 1),
        Case("reconstruction_error", ("EMA-8",), ema.reconstruction_error, snapshots, errors, 1),
    ]


def _other_cases() -> list[Case]:
    n = draw.IMAGES[0]
    sigmas = draw.numbers(n, 1, 1, 1, low=0.002, high=80)
    images = draw.numbers(*draw.IMAGES, low=-10, high=10)
    errors = st.tuples(images, images, sigmas, draw.numbers(n, 1, 1, 1, low=-3, high=3))

    def steps(**options: Any) -> Callable[..., Any]:
        def run(x: Any, *churn: Any) -> Any:
            denoise = sampler.guided(lambda x, s: x / (1 + s * s), lambda x, s: x / (1 + 2 * s * s), guidance=1.5)
            return sampler.sample(denoise, x, S_churn=1.0, churn_noise=churn, **options)

        return run

    def preconditioned(sigma: Any) -> tuple[Any, ...]:
        return tuple(precond.precondition(sigma))

    def log(sigma: np.ndarray) -> tuple[Any, ...]:
        c = precond.precondition(sigma)
        return c.c_skip, c.c_out, c.c_in, 1 + np.abs(c.c_noise)

    def denoised(x: Any, sigma: Any) -> Any:
        return precond.denoise(lambda x, c_noise: x * c_noise[:, None, None, None], x, sigma)

    def both_parts(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        c = precond.precondition(sigma)
        return np.abs(x) * (c.c_skip + c.c_out * c.c_in * (1 + np.abs(c.c_noise)))

    def error_magnitude(d: Any, y: Any, sigma: Any, u: Any) -> Any:
        return loss.loss(np.abs(d) + np.abs(y), 0 * y, sigma, u) * (1 + np.abs(u)) + np.abs(u)

    def level_magnitude(z: Any) -> Any:
        return loss.noise_level(z) * (1 + np.abs(z))

    def noise_magnitude(*noises: Any) -> Any:
        return 2 * sum(map(np.abs, noises))

    def guided(x: Any) -> Any:
        return sampler.guided(lambda x, s: x * s, lambda x, s: -x, guidance=3.0)(x, 0.5)

    labels = st.tuples(draw.numbers(5, 3, low=0, high=1), draw.numbers(5, low=0, high=1))

    def dropped(rows: Any, uniform: Any) -> Any:
        return loss.drop_labels(rows, uniform, probability=0.5)

    floats = codec.Codec(stored="float32", mean=(1.5, -20.0, 0.0), scale=(2.0, 0.5, 8.0))

    def floats_magnitude(values: np.ndarray) -> np.ndarray:
        return 8 * (np.abs(values) + 20) * 2

    def latents_magnitude(moments: np.ndarray, normal: np.ndarray) -> np.ndarray:
        return codec.draw_latents(np.abs(moments), np.abs(normal))

    normals = st.tuples(draw.numbers(7, low=-5, high=5))
    # four steps of two evaluations with about eight roundings each; nothing grows, because 0 <= D <= x
    noises = st.tuples(*[draw.numbers(*draw.IMAGES, low=-3, high=3)] * 5)
    short: Any = {"num_steps": 4, "sigma_max": 2.0}
    heun, euler = steps(**short), steps(**short, method="euler")
    changed = steps(sigmas=(2.0, 1.0, 0.3, 0.1, 0.0), callback=lambda step: step.x * 0.5 + step.denoised * 0.25)
    return [
        Case("precondition", ("PRE-1",), precond.precondition, st.tuples(sigmas), preconditioned, 8, log),
        # four coefficients of 8 eps each, and their products
        Case("denoise", ("PRE-1",), precond.denoise, st.tuples(images, sigmas), denoised, 40, both_parts),
        Case("join_condition", ("NET-11",), precond.join_condition, _images(0, 5), precond.join_condition, 2),
        Case("encode", ("DATA-1",), codec.Codec.encode, _images(3), floats.encode, 4, floats_magnitude),
        Case("decode", ("DATA-1",), codec.Codec.decode, _images(3), floats.decode, 4, floats_magnitude),
        Case("draw_latents", ("DATA-2",), codec.draw_latents, _images(6, 3), codec.draw_latents, 4, latents_magnitude),
        Case("noise_level", ("LOSS-1",), loss.noise_level, normals, loss.noise_level, 4, level_magnitude),
        Case("weight", ("LOSS-2",), loss.weight, st.tuples(sigmas), loss.weight, 8),
        Case("loss", ("LOSS-3",), loss.loss, errors, loss.loss, 16, error_magnitude),
        Case("drop_labels", ("LOSS-4",), loss.drop_labels, labels, dropped, 0),
        Case("sample-heun", ("SAMPLE-2",), sampler.sample, noises, heun, 64, noise_magnitude),
        Case("sample-euler", ("SAMPLE-2",), sampler.sample, noises, euler, 64, noise_magnitude),
        Case("sample-callback", ("SAMPLE-1", "SAMPLE-2"), sampler.sample, noises, changed, 64, noise_magnitude),
        Case("guided", ("SAMPLE-5",), sampler.guided, _images(0), guided, 8),
    ]


CASES = (*_mp_cases(), *_ema_cases(), *_other_cases())
