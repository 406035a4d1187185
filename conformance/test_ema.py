"""Averages of power-function profile: the recursion, its integral, what can be rebuilt from stored ones (SPEC EMA).

The oracle is integration: exact for weights that are constant between updates, where an average is the sum of
w_k ((t_k / T)^(gamma + 1) - (t_(k-1) / T)^(gamma + 1)), and mpmath's quadrature of the profile elsewhere.
"""

from itertools import pairwise
from math import sqrt
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from edm2_core import ema
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")
lengths = st.floats(0.01, ema.LONGEST)
gammas = st.floats(0, 1e6)
times = st.floats(1, 1e10)


def exact_sigma_rel(gamma: Any) -> Any:
    """Eq. 126 in mpmath's precision."""
    return mpmath.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def segment_weights(edges: np.ndarray, sigma_rel: float, end: float) -> np.ndarray:
    """The profile's integral over each interval between ``edges`` (starting at 0), cut off at ``end``."""
    power = np.minimum(edges / end, 1.0) ** (ema.sigma_rel_to_gamma(sigma_rel) + 1)
    return np.diff(power)


def track(weights: np.ndarray, edges: np.ndarray, sigma_rel: float) -> np.ndarray:
    """The average after each update: weights [steps, ...] hold from each of ``edges`` to the next."""
    average, history = np.full(weights.shape[1:], np.nan), []
    for w, start, end in zip(weights, edges, edges[1:], strict=False):
        keep = ema.beta(sigma_rel, t_next=end, t_delta=end - start)
        average = w if keep == 0 else keep * average + (1 - keep) * w
        history.append(average)
    return np.stack(history)


@given(gammas)
def test_gamma_to_sigma_rel_is_the_standard_deviation(gamma: float) -> None:
    """EMA-1: of the profile, in closed form from its first two moments, in 40 digits."""
    with mpmath.workdps(40):
        g = mpmath.mpf(gamma)
        mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
        wanted = float(mpmath.sqrt(square - mean**2))
    assert ema.gamma_to_sigma_rel(gamma) == pytest.approx(wanted, rel=8 * EPS)


@given(gammas)
def test_gamma_returns_from_sigma_rel(gamma: float) -> None:
    """EMA-1: gamma -> sigma_rel -> gamma. 16 eps of sigma_rel come back times |d gamma / d ln sigma_rel|."""
    s = ema.gamma_to_sigma_rel(gamma)
    slope = 1 / abs(1 / (2 * (gamma + 1)) - 1 / (gamma + 2) - 1 / (2 * (gamma + 3)))
    assert abs(ema.sigma_rel_to_gamma(s) - gamma) <= 16 * EPS * (1 + gamma + slope)


@given(st.floats(1e-6, ema.LONGEST))
def test_sigma_rel_returns_from_gamma(s: float) -> None:
    """EMA-1: sigma_rel -> gamma -> sigma_rel."""
    assert ema.gamma_to_sigma_rel(ema.sigma_rel_to_gamma(s)) == pytest.approx(s, rel=16 * EPS)


@given(draw.floats(0.015625, 0.28125))
def test_inverses_in_float32(s: float) -> None:
    """EMA-1: at single precision, to as many of its eps."""
    x = np.asarray([s], dtype=np.float32)
    back = ema.gamma_to_sigma_rel(ema.sigma_rel_to_gamma(x))
    assert back.dtype == np.float32
    assert back == pytest.approx(x, rel=16 * tolerance.eps("float32"))


def test_published_gammas() -> None:
    """EMA-1: the paper's 16.97 and 6.94, and the largest length, the plain mean's."""
    assert round(ema.sigma_rel_to_gamma(0.05), 2) == 16.97
    assert round(ema.sigma_rel_to_gamma(0.10), 2) == 6.94
    assert ema.sigma_rel_to_gamma(12**-0.5) == pytest.approx(0, abs=1e-14)
    assert ema.gamma_to_sigma_rel(0) == 12**-0.5


@given(lengths, times)
def test_profile_has_unit_integral_and_its_length(s: float, end: float) -> None:
    """EMA-2: integral 1 and standard deviation sigma_rel t, by tanh-sinh quadrature."""

    def moment(power: int) -> float:
        return float(
            mpmath.quad(lambda u: ema.profile(float(u) * end, end_time=end, sigma_rel=s) * end * u**power, cuts)
        )

    cuts = [0, max(0.0, 1 - 8 * s), max(0.001, 1 - 2 * s), 1]
    area, mean = moment(0), moment(1)
    assert area == pytest.approx(1, abs=1e-9)
    assert sqrt(moment(2) - mean**2) == pytest.approx(s, rel=1e-5)  # a difference of numbers about s^-2 times as large
    assert ema.profile(-1.0, end_time=end, sigma_rel=s) == 0
    assert ema.profile(end * 1.001, end_time=end, sigma_rel=s) == 0


@given(lengths, st.lists(st.floats(0.1, 100), min_size=1, max_size=20), draw.seeds)
def test_updates_integrate_the_profile(s: float, deltas: list[float], seed: int) -> None:
    """EMA-3: any sequence of t_delta; each update rounds by 2 eps of its weight, and beta by gamma eps."""
    edges = np.cumsum([0.0, *deltas])
    weights = np.random.default_rng(seed).standard_normal((len(deltas), 3))
    wanted = segment_weights(edges, s, edges[-1]) @ weights
    got = track(weights, edges, s)[-1]
    allowed = 8 * EPS * len(deltas) * (1 + ema.sigma_rel_to_gamma(s)) * np.abs(weights).max()
    assert np.allclose(got, wanted, rtol=0, atol=allowed)


@given(lengths, st.integers(2, 6), st.floats(0.5, 20))
def test_updates_are_the_quadrature_of_the_profile(s: float, steps: int, delta: float) -> None:
    """EMA-3: the same with the profile itself integrated numerically, not in closed form."""
    edges = delta * np.arange(steps + 1.0)
    share = [
        float(mpmath.quad(lambda u: ema.profile(float(u), end_time=float(edges[-1]), sigma_rel=s), [a, b]))
        for a, b in pairwise(edges)
    ]
    assert np.allclose(track(np.eye(steps), edges, s)[-1], share, rtol=0, atol=1e-9)


@given(lengths, st.floats(0, 1e6), st.floats(0.1, 1e3), st.integers(1, 12))
def test_many_updates_are_one(s: float, start: float, delta: float, count: int) -> None:
    """EMA-3: k updates of delta with the same weight are one of k delta: the clock is images, not steps."""
    keep = 1.0
    for i in range(1, count + 1):
        keep *= ema.beta(s, t_next=start + i * delta, t_delta=delta) if start or i > 1 else 0.0
    once = ema.beta(s, t_next=start + count * delta, t_delta=count * delta) if start else 0.0
    gamma = ema.sigma_rel_to_gamma(s)
    assert keep == pytest.approx(once, abs=16 * EPS * (1 + gamma) * count * (1 + start / delta))


@given(lengths, times)
def test_first_update_copies(s: float, t: float) -> None:
    """EMA-3: beta is exactly 0 at t_delta = t_next."""
    assert ema.beta(s, t_next=t, t_delta=t) == 0


@given(lengths, lengths, times, st.floats(0.05, 1), st.booleans())
def test_inner_product_is_accurate_and_symmetric(
    s_a: float, s_b: float, later: float, ratio: float, swap: bool
) -> None:
    """EMA-4: Eq. 151 in 30 digits, and symmetric. 64 eps times gamma, the exponent."""
    earlier = later * ratio
    with mpmath.workdps(30):
        a, b = (mpmath.mpf(ema.sigma_rel_to_gamma(s)) for s in (s_a, s_b))
        r = mpmath.mpf(earlier) / mpmath.mpf(later)
        wanted = float((a + 1) * (b + 1) * r**b / (a + b + 1) / later)
    pair: dict[str, float] = {"time_a": earlier, "sigma_rel_a": s_a, "time_b": later, "sigma_rel_b": s_b}
    if swap:
        pair = {"time_a": later, "sigma_rel_a": s_b, "time_b": earlier, "sigma_rel_b": s_a}
    gamma = float(max(a, b))
    assert ema.inner_product(**pair) == pytest.approx(wanted, rel=64 * EPS * (1 + gamma))


@given(st.floats(0.03, 0.28), st.floats(0.03, 0.28), st.floats(0.5, 1))
def test_inner_product_is_the_quadrature_of_profiles(s_a: float, s_b: float, ratio: float) -> None:
    """EMA-4: against numeric integration of ema.profile, which knows nothing of Eq. 151."""

    def product(u: Any) -> float:
        a = ema.profile(float(u), end_time=ratio, sigma_rel=s_a)
        return a * ema.profile(float(u), end_time=1.0, sigma_rel=s_b)

    wanted = float(mpmath.quad(product, [0, ratio / 2, ratio * 0.9, ratio]))
    got = ema.inner_product(time_a=ratio, sigma_rel_a=s_a, time_b=1.0, sigma_rel_b=s_b)
    assert got == pytest.approx(wanted, rel=1e-8)


def test_inner_product_neither_overflows_nor_underflows() -> None:
    """EMA-4: the ratio form, at times whose powers float64 cannot hold."""
    got = ema.inner_product(time_a=2e9, sigma_rel_a=0.001, time_b=2e9, sigma_rel_b=0.001)
    gamma = ema.sigma_rel_to_gamma(0.001)
    assert got == pytest.approx((gamma + 1) ** 2 / (2 * gamma + 1) / 2e9, rel=1e-10)


@st.composite
def snapshots(draw_: Any, *, most: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of time and length, in images: evenly spaced times, two lengths."""
    count, spacing = draw_(st.integers(1, most)), draw_(st.sampled_from([1.0, 1000.0, 8.0 * 2**20]))
    short = draw_(st.floats(0.03, 0.08))
    pair = (short, draw_(st.floats(short + 0.05, 0.28)))
    return np.repeat(np.arange(1, count + 1.0) * spacing, 2), np.tile(pair, count)


def gram_of(t: np.ndarray, s: np.ndarray) -> np.ndarray:
    return ema.inner_product(time_a=t[:, None], sigma_rel_a=s[:, None], time_b=t[None], sigma_rel_b=s[None])


@given(snapshots(), st.floats(0.03, 0.28), st.floats(0.3, 1.2))
def test_coefficients_are_the_least_squares_fit(stored: tuple[np.ndarray, np.ndarray], s: float, at: float) -> None:
    """EMA-5: Algorithm 3 in 60 digits from Eq. 151, divided by the sum; later snapshots get 0; columns sum to 1."""
    t_in, s_in = stored
    end = max(at * t_in[-1], t_in[0])
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=end, out_sigma_rel=s)
    assert got.shape == (len(t_in), 1)
    usable = t_in <= end
    with mpmath.workdps(60):

        def gamma(length: float) -> Any:
            near = ema.sigma_rel_to_gamma(length)
            return mpmath.findroot(lambda g: exact_sigma_rel(g) - mpmath.mpf(length), (near, near + 1e-6))

        def product(t_a: float, g_a: Any, t_b: float, g_b: Any) -> Any:
            if t_a > t_b:
                t_a, g_a, t_b, g_b = t_b, g_b, t_a, g_a
            return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (mpmath.mpf(t_a) / t_b) ** g_b / t_b

        profiles = [(t, gamma(length)) for t, length in zip(t_in[usable], s_in[usable], strict=True)]
        target = (end, gamma(s))
        gram = mpmath.matrix([[product(*a, *b) for b in profiles] for a in profiles])
        fit = mpmath.lu_solve(gram, mpmath.matrix([product(*a, *target) for a in profiles]))
        wanted = np.asarray([float(c / sum(fit)) for c in fit])
    condition = tolerance.gram_condition(gram_of(t_in[usable], s_in[usable]))
    allowed = 64 * EPS * condition * np.abs(wanted).max()
    assert np.allclose(got[usable, 0], wanted, rtol=0, atol=allowed)
    assert not got[~usable].any()
    assert got.sum() == pytest.approx(1, abs=1e-12 * (1 + np.abs(got).sum()))


@given(snapshots(), st.floats(0.03, 0.28), st.floats(1e-6, 1e6))
def test_coefficients_do_not_depend_on_the_unit_of_time(
    stored: tuple[np.ndarray, np.ndarray], s: float, unit: float
) -> None:
    """EMA-5"""
    t_in, s_in = stored
    options: Any = {"in_sigma_rel": s_in, "out_sigma_rel": s}
    wanted = ema.coefficients(in_time=t_in, out_time=t_in[-1], **options)
    got = ema.coefficients(in_time=t_in * unit, out_time=t_in[-1] * unit, **options)
    allowed = 256 * EPS * tolerance.gram_condition(gram_of(t_in, s_in)) * np.abs(wanted).max()
    assert np.allclose(got, wanted, rtol=0, atol=allowed)


@given(snapshots(most=3), st.floats(0.03, 0.28), st.integers(2, 4))
def test_duplicates_share_evenly(stored: tuple[np.ndarray, np.ndarray], s: float, times_over: int) -> None:
    """EMA-5: a snapshot stored k times gets a k-th of its coefficient each time."""
    t_in, s_in = stored
    single = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[-1], out_sigma_rel=s)
    again: Any = {"in_time": np.tile(t_in, times_over), "in_sigma_rel": np.tile(s_in, times_over)}
    got = ema.coefficients(**again, out_time=t_in[-1], out_sigma_rel=s)
    allowed = 256 * EPS * times_over * tolerance.gram_condition(gram_of(t_in, s_in)) * np.abs(single).max()
    assert np.allclose(got, np.tile(single, (times_over, 1)) / times_over, rtol=0, atol=allowed)


@given(snapshots(), st.data())
def test_stored_averages_are_found(stored: tuple[np.ndarray, np.ndarray], data: Any) -> None:
    """EMA-6: one-hot, whichever of the stored is wanted; several targets at once are columns."""
    t_in, s_in = stored
    wanted = data.draw(st.lists(st.integers(0, len(t_in) - 1), min_size=1, max_size=3))
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[wanted], out_sigma_rel=s_in[wanted])
    allowed = 64 * EPS * tolerance.gram_condition(gram_of(t_in, s_in))
    assert np.allclose(got, np.eye(len(t_in))[:, wanted], rtol=0, atol=allowed)


@draw.fewer(4)
@given(st.floats(0.04, 0.25), st.sampled_from([8, 16, 32]), draw.seeds, st.booleans())
def test_reconstruction_error_is_predicted(s: float, count: int, seed: int, walk: bool) -> None:
    """EMA-7: weights that follow white noise, or a random walk, tracked at (0.05, 0.10) and rebuilt at another length.

    The error of the rebuilt average is sum_k r_k w_k with r_k the residual profile's integral over step k. For white
    noise its variance is sum r_k^2, about delta times the residual's squared L2 norm; for a walk, the sum of squares
    of r's tail sums. 2000 independent weights: within 6 standard errors.
    """
    steps, parameters = 16 * count, 2000
    edges = np.arange(steps + 1.0)
    moves = np.random.default_rng(seed).standard_normal((steps, parameters))
    weights = np.cumsum(moves, axis=0) if walk else moves
    t_in = np.repeat(np.arange(1, count + 1) * 16.0, 2)
    s_in = np.tile([0.05, 0.10], count)
    histories = {length: track(weights, edges, length) for length in (0.05, 0.10)}
    stored = np.stack([histories[length][int(t) - 1] for t, length in zip(t_in, s_in, strict=True)])
    c = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=float(steps), out_sigma_rel=s)[:, 0]
    error = c @ stored - track(weights, edges, s)[-1]

    profiles = np.stack([segment_weights(edges, length, t) for t, length in zip(t_in, s_in, strict=True)])
    residual = c @ profiles - segment_weights(edges, s, float(steps))
    response = np.cumsum(residual[::-1]) if walk else residual  # to each independent move
    predicted = float(np.sum(response**2))
    assume(predicted > 1e-18)  # s is one of the stored
    assert np.mean(error**2) / predicted == pytest.approx(1, abs=tolerance.mean_square(parameters))


@draw.fewer(4)
@given(st.floats(0.04, 0.25), st.sampled_from([8, 32]))
def test_residual_is_that_of_inner_products(s: float, count: int) -> None:
    """EMA-7: the residual's L2 norm from Eq. 151 is that of the profile on a fine grid."""
    t_in, s_in = np.repeat(np.arange(1.0, count + 1), 2), np.tile([0.05, 0.10], count)
    end = float(count)
    c = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=end, out_sigma_rel=s)[:, 0]
    target = ema.inner_product(time_a=t_in, sigma_rel_a=s_in, time_b=end, sigma_rel_b=s)
    norm = ema.inner_product(time_a=end, sigma_rel_a=s, time_b=end, sigma_rel_b=s)
    predicted = c @ gram_of(t_in, s_in) @ c - 2 * c @ target + norm
    t = (np.arange(4000 * count) + 0.5) / 4000
    stored = ema.profile(t[None], end_time=t_in[:, None], sigma_rel=s_in[:, None])
    residual = c @ stored - ema.profile(t, end_time=end, sigma_rel=s)
    assert np.sum(residual**2) / 4000 == pytest.approx(predicted, rel=1e-3, abs=1e-9 * norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_time": [], "in_sigma_rel": []}, r"one or more numbers in a row, got shape \(0,\)"),
        ({"in_time": [-1.0]}, r"in_time must be positive, got -1"),
        ({"in_sigma_rel": [0.3]}, r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
        ({"out_sigma_rel": 0.0}, r"sigma_rel must be within \(0, 0.2887\), got 0"),
        ({"out_time": 0.5}, r"before every snapshot, got 0.5 with the first at 1: choose a later target"),
    ],
)
def test_coefficients_refuse(change: dict[str, Any], message: str) -> None:
    """API-4 EMA-5"""
    options: dict[str, Any] = {"in_time": [1.0], "in_sigma_rel": [0.1], "out_time": 2.0, "out_sigma_rel": 0.1}
    with pytest.raises(InputError, match=message):
        ema.coefficients(**options | change)


@pytest.mark.parametrize(
    ("t_next", "t_delta", "message"),
    [
        (0, 1, "t_next must be positive"),
        (1, 0, "t_delta must be positive"),
        (1, 2, "t_delta / t_next must be at most 1"),
    ],
)
def test_beta_refuses(t_next: float, t_delta: float, message: str) -> None:
    """API-4 EMA-3"""
    with pytest.raises(InputError, match=message):
        ema.beta(0.1, t_next=t_next, t_delta=t_delta)
