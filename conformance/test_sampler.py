"""The sampler, on the denoiser of Gaussian data, whose flow is known in closed form (SPEC SAMPLE).

For data N(mu, s^2): D = (s^2 x + sigma^2 mu) / (s^2 + sigma^2), so dx/dsigma = sigma (x - mu) / (s^2 + sigma^2) and
x - mu is proportional to sqrt(s^2 + sigma^2).
"""

from math import inf, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.clauses import proves
from edm2_core import sampler
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")
means, spreads = st.floats(-2, 2), st.floats(0.2, 2)
# far below the data's spread: the Euler step from here to 0 leaves an error of (sigma / s)^2 / 2 at any step count
SIGMA_MIN = 1e-6
NOISE = np.asarray([1.0, -0.7, 2.0])


def gaussian(mu: float, s: float) -> sampler.Denoiser:
    return lambda x, sigma: (s**2 * x + sigma**2 * mu) / (s**2 + sigma**2)


def counted(denoise: sampler.Denoiser) -> tuple[sampler.Denoiser, list[float]]:
    """``denoise``, and the noise levels at which it was evaluated."""
    seen: list[float] = []

    def wrapper(x: Any, sigma: float) -> Any:
        seen.append(sigma)
        return denoise(x, sigma)

    return wrapper, seen


@proves("SAMPLE-1")
@given(st.integers(2, 64), st.floats(1e-4, 0.1), st.floats(1, 100), st.floats(1, 10))
def test_noise_levels(n: int, low: float, high: float, rho: float) -> None:
    """From sigma_max to sigma_min, evenly in the power 1 / rho, and 0."""
    levels = sampler.noise_levels(n, sigma_min=low, sigma_max=high, rho=rho)
    assert len(levels) == n + 1
    assert levels[-1] == 0
    assert (levels[0], levels[-2]) == pytest.approx((high, low), rel=8 * rho * EPS * (high / low) ** (1 / rho))
    gaps = np.diff(np.asarray(levels[:-1]) ** (1 / rho))
    assert np.allclose(gaps, gaps[0], rtol=0, atol=64 * EPS * high ** (1 / rho))
    assert sampler.noise_levels(1, sigma_max=high) == [pytest.approx(high), 0]


@proves("SAMPLE-2")
@pytest.mark.parametrize(("method", "count"), [("heun", 63), ("euler", 32)])
def test_number_of_evaluations(method: Any, count: int) -> None:
    """63 for 32 Heun steps, at the levels of the schedule in order, never at 0."""
    denoise, seen = counted(gaussian(0, 0.5))
    sampler.sample(denoise, np.ones((1, 1, 1, 1)), method=method)
    assert len(seen) == count
    levels = sampler.noise_levels(32)
    wanted = levels[:-1] if method == "euler" else [levels[0], *[x for x in levels[1:-1] for _ in (0, 1)]]
    assert seen == wanted


@proves("SAMPLE-2")
@given(draw.seeds, st.integers(1, 6), st.sampled_from(["heun", "euler"]))
def test_steps_are_algorithm_2(seed: int, n: int, method: Any) -> None:
    """Oracle: the paper's pseudocode, for a denoiser that is not linear."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(5)

    def denoise(x: Any, sigma: float) -> Any:
        return np.tanh(x / (1 + sigma))

    t = sampler.noise_levels(n, sigma_min=0.1, sigma_max=5)
    x = t[0] * noise
    for i in range(n):
        d = (x - denoise(x, t[i])) / t[i]
        after = x + (t[i + 1] - t[i]) * d
        if method == "heun" and t[i + 1] != 0:
            d2 = (after - denoise(after, t[i + 1])) / t[i + 1]
            after = x + (t[i + 1] - t[i]) * (d / 2 + d2 / 2)
        x = after
    got = sampler.sample(denoise, noise, num_steps=n, sigma_min=0.1, sigma_max=5, method=method)
    assert np.allclose(got, x, rtol=0, atol=1e-12)


def trajectory(n: int, **options: Any) -> tuple[np.ndarray, list[sampler.Step]]:
    """Samples of ``n`` steps of the schedule, and what the callback received."""
    steps: list[sampler.Step] = []
    sampled = sampler.sample(gaussian(0.3, 0.5), NOISE, num_steps=n, callback=steps.append, **options)
    return sampled, steps


@proves("SAMPLE-1", "SAMPLE-2")
@given(st.integers(2, 6), st.data())
def test_sigmas_replace_the_schedule(n: int, data: Any) -> None:
    """The schedule's own levels give the same samples; a schedule cut off at a level gives x there."""
    levels, (whole, steps) = sampler.noise_levels(n), trajectory(n)
    assert np.array_equal(sampler.sample(gaussian(0.3, 0.5), NOISE, sigmas=levels), whole)
    k = data.draw(st.integers(1, n - 1))
    assert np.array_equal(sampler.sample(gaussian(0.3, 0.5), NOISE, sigmas=levels[: k + 1]), steps[k - 1].x)


@proves("SAMPLE-2")
@given(st.integers(1, 6), st.sampled_from(["heun", "euler"]))
def test_the_callback_receives_each_step(n: int, method: Any) -> None:
    """Index and level after the step, x there, and the denoised images of its beginning."""
    levels, (whole, steps) = sampler.noise_levels(n), trajectory(n, method=method)
    assert [(step.index, step.sigma) for step in steps] == list(enumerate(levels[1:]))
    assert np.array_equal(steps[-1].x, whole)
    starts = [NOISE * levels[0], *(step.x for step in steps[:-1])]
    for step, x, sigma in zip(steps, starts, levels, strict=False):
        assert np.array_equal(step.denoised, gaussian(0.3, 0.5)(x, sigma))


@proves("SAMPLE-2")
@given(st.integers(2, 6), st.data())
def test_the_callback_changes_or_stops_the_trajectory(n: int, data: Any) -> None:
    """An array that it returns takes the place of x; Stop returns the x of that step, with no further evaluation."""
    k, levels = data.draw(st.integers(0, n - 2)), sampler.noise_levels(n)
    denoise, seen = counted(gaussian(0.3, 0.5))
    other = np.asarray([0.5, 1.5, -2.0])

    def change(step: sampler.Step) -> np.ndarray | None:
        return other * levels[k + 1] if step.index == k else None

    def stop(step: sampler.Step) -> None:
        if step.index == k:
            seen.clear()
            raise sampler.Stop

    changed = sampler.sample(denoise, NOISE, num_steps=n, callback=change)
    assert np.array_equal(changed, sampler.sample(denoise, other, sigmas=levels[k + 1 :]))
    assert np.array_equal(sampler.sample(denoise, NOISE, num_steps=n, callback=stop), trajectory(n)[1][k].x)
    assert not seen


def order_error(steps: int, mu: float, s: float, method: Any) -> float:
    got = sampler.sample(gaussian(mu, s), NOISE, num_steps=steps + 1, sigma_min=SIGMA_MIN, method=method)
    wanted = mu + (NOISE * 80.0 - mu) * s / sqrt(s**2 + 80.0**2)
    return float(np.abs(got - wanted).max())


@proves("SAMPLE-3")
@pytest.mark.parametrize(("method", "factor"), [("heun", 4), ("euler", 2)])
@given(mu=means, s=spreads)
def test_order_of_convergence(method: Any, factor: int, mu: float, s: float) -> None:
    """The error is c n^-p (1 + O(1 / n)), so the ratio of errors at n and 2 n is 2^p to O(1 / n): within 10 %
    at 128 steps, 5 % at 256, 2.5 % at 512 for these denoisers, and ever closer."""
    errors = [order_error(n, mu, s, method) for n in (128, 256, 512, 1024)]
    for error, halved, bound in zip(errors, errors[1:], (0.1, 0.05, 0.025), strict=False):
        assert error / halved == pytest.approx(factor, rel=bound)


@proves("SAMPLE-3")
@given(means, spreads)
def test_default_steps_are_near_the_closed_form(mu: float, s: float) -> None:
    """32 Heun steps from 80 to 0.002 end within 5 % of the data's spread."""
    noise = np.linspace(-3, 3, 7)
    got = sampler.sample(gaussian(mu, s), noise)
    wanted = mu + (noise * 80.0 - mu) * s / sqrt(s**2 + 80.0**2)
    assert np.abs(got - wanted).max() <= 0.05 * (np.abs(wanted - mu).max())


def spread_with_churn(steps: int, s: float, **churn: Any) -> float:
    """The exact standard deviation of samples: they are linear in the noises, so unit vectors give the weight of
    each."""
    each = np.eye(steps + 1)
    out = sampler.sample(gaussian(0, s), each[0], num_steps=steps, churn_noise=list(each[1:]), **churn)
    return float(np.linalg.norm(out))


@proves("SAMPLE-4")
@given(s=spreads, churn=st.floats(1, 40))
def test_churn_keeps_the_distribution(s: float, churn: float) -> None:
    """The relative error of the spread falls at least as 1 / n and is below 1 % at 512 steps."""
    coarse, fine = (abs(spread_with_churn(n, s, S_churn=churn) / s - 1) for n in (128, 512))
    assert fine < 0.01
    assert fine < coarse / 4


@proves("SAMPLE-4")
def test_churn_with_excess_noise_widens() -> None:
    """S_noise scales the fresh noise and nothing else."""
    plain, more = (spread_with_churn(256, 0.5, S_churn=20, S_noise=scale) for scale in (1.0, 1.1))
    assert more > plain * 1.01


@proves("SAMPLE-4")
@given(draw.seeds, st.integers(1, 6), st.floats(0.5, 60), st.floats(0.9, 1.1))
def test_churn_is_algorithm_2(seed: int, n: int, churn: float, s_noise: float) -> None:
    """Oracle: the paper's pseudocode. Noise is used in order, and only at levels within [S_min, S_max]."""
    rng = np.random.default_rng(seed)
    noise, fresh, s_min, s_max = rng.standard_normal(4), rng.standard_normal((n, 4)), 0.15, 3.0
    denoise = gaussian(0.3, 0.5)
    t, used = sampler.noise_levels(n, sigma_min=0.1, sigma_max=5), iter(fresh)
    x = t[0] * noise
    for i in range(n):
        gamma = min(churn / n, sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
        hat = t[i] + gamma * t[i]
        if gamma:
            x = x + sqrt(hat**2 - t[i] ** 2) * s_noise * next(used)
        d = (x - denoise(x, hat)) / hat
        after = x + (t[i + 1] - hat) * d
        if t[i + 1] != 0:
            after = x + (t[i + 1] - hat) * (d / 2 + (after - denoise(after, t[i + 1])) / t[i + 1] / 2)
        x = after
    options: Any = {"num_steps": n, "sigma_min": 0.1, "sigma_max": 5, "S_churn": churn, "S_min": s_min, "S_max": s_max}
    got = sampler.sample(denoise, noise, S_noise=s_noise, churn_noise=fresh, **options)
    assert np.allclose(got, x, rtol=0, atol=1e-12)


@proves("SAMPLE-5")
@given(draw.seeds, st.floats(-2, 4), st.floats(0.1, 10))
def test_guidance_is_linear(seed: int, w: float, sigma: float) -> None:
    """The result is guide + w (net - guide)."""
    x = np.random.default_rng(seed).standard_normal(5)
    net, guide = gaussian(0.5, 0.4), gaussian(-0.5, 1.2)
    wanted = w * net(x, sigma) + (1 - w) * guide(x, sigma)
    assert np.allclose(sampler.guided(net, guide, guidance=w)(x, sigma), wanted, atol=64 * EPS)


@proves("SAMPLE-5")
@given(st.floats(0.1, 1), st.floats(1, 10), st.floats(0.01, 100))
def test_guidance_respects_its_interval(low: float, high: float, sigma: float) -> None:
    """The ends of the interval are inside; outside it the guide is not evaluated."""
    x = np.ones(3)
    net, (guide, seen) = gaussian(0.5, 0.4), counted(gaussian(-0.5, 1.2))
    denoise = sampler.guided(net, guide, guidance=2.0, interval=(low, high))
    inside = low <= sigma <= high
    wanted = 2 * net(x, sigma) - gaussian(-0.5, 1.2)(x, sigma) if inside else net(x, sigma)
    assert np.allclose(denoise(x, sigma), wanted, atol=64 * EPS)
    assert len(seen) == inside
    denoise(x, low)
    denoise(x, high)
    assert len(seen) == inside + 2


@proves("SAMPLE-5")
def test_no_guidance_does_not_evaluate_the_guide() -> None:
    guide, seen = counted(gaussian(0, 1))
    sampler.sample(sampler.guided(gaussian(0, 0.5), guide, guidance=1.0), np.ones(2), num_steps=4)
    assert not seen


@proves("API-4", "SAMPLE-2")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, r"num_steps >= 1.* got num_steps 0"),
        ({"sigma_min": 0.0}, r"0 < sigma_min < sigma_max .* sigma_min 0.0"),
        ({"sigma_min": 90.0}, r"0 < sigma_min < sigma_max .* sigma_min 90.0, sigma_max 80.0"),
        ({"rho": 0.0}, r"rho > 0, .* rho 0.0"),
        ({"sigmas": [1.0]}, r"sigmas must be two or more finite levels, .* got \[1.0\]"),
        ({"sigmas": [1.0, 2.0, 0.0]}, r"each below the one before, got \[1.0, 2.0, 0.0\]"),
        ({"sigmas": [1.0, -1.0]}, r"sigmas must be"),
        ({"sigmas": [inf, 1.0]}, r"sigmas must be"),
        ({"method": "rk4"}, r"method must be 'heun' or 'euler', got 'rk4'"),
        ({"S_churn": 10.0, "S_max": inf}, r"needs one array of churn_noise for each step .*: give more"),
        ({"S_churn": 10.0, "churn_noise": [np.zeros(2)]}, r"give more of them"),
    ],
)
def test_sampler_refuses(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler.sample(gaussian(0, 1), np.ones(2), **options)
