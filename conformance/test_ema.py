"""Power-function and traditional averages: lengths, profiles, updates and inner products (SPEC EMA).

The oracle is integration. For weights that are constant between updates an average is the sum of
w_k ((t_k / T)^(gamma + 1) - (t_(k-1) / T)^(gamma + 1)); elsewhere mpmath integrates the profile numerically.
"""

from itertools import pairwise
from math import sqrt
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.averages import segment_weights, track
from conformance.clauses import proves
from edm2_core import ema
from edm2_core.ema import Length
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")
lengths = st.floats(0.01, ema.LONGEST)
gammas = st.floats(0, 1e6)
times = st.floats(1, 1e10)
half_lives = st.floats(0.5, 1e5)


@proves("EMA-1")
@given(gammas)
def test_gamma_to_sigma_rel_is_the_standard_deviation(gamma: float) -> None:
    """Oracle: the standard deviation from the profile's first two moments, in 40 digits."""
    with mpmath.workdps(40):
        g = mpmath.mpf(gamma)
        mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
        wanted = float(mpmath.sqrt(square - mean**2))
    assert ema.gamma_to_sigma_rel(gamma) == pytest.approx(wanted, rel=8 * EPS)


@proves("EMA-1")
@given(gammas)
def test_gamma_returns_from_sigma_rel(gamma: float) -> None:
    """An error of 16 eps in sigma_rel is amplified by |d gamma / d ln sigma_rel|."""
    s = ema.gamma_to_sigma_rel(gamma)
    slope = 1 / abs(1 / (2 * (gamma + 1)) - 1 / (gamma + 2) - 1 / (2 * (gamma + 3)))
    assert abs(ema.sigma_rel_to_gamma(s) - gamma) <= 16 * EPS * (1 + gamma + slope)


@proves("EMA-1")
@given(st.floats(1e-6, ema.LONGEST))
def test_sigma_rel_returns_from_gamma(s: float) -> None:
    assert ema.gamma_to_sigma_rel(ema.sigma_rel_to_gamma(s)) == pytest.approx(s, rel=16 * EPS)


@proves("EMA-1")
@given(draw.floats(0.015625, 0.28125))
def test_inverses_in_float32(s: float) -> None:
    """float32 in gives float32 out, to 16 of its eps."""
    x = np.asarray([s], dtype=np.float32)
    back = ema.gamma_to_sigma_rel(ema.sigma_rel_to_gamma(x))
    assert back.dtype == np.float32
    assert back == pytest.approx(x, rel=16 * tolerance.eps("float32"))


@proves("EMA-1")
def test_published_gammas() -> None:
    """The paper prints 16.97 and 6.94; the longest average is the plain mean, gamma = 0."""
    assert round(ema.sigma_rel_to_gamma(0.05), 2) == 16.97
    assert round(ema.sigma_rel_to_gamma(0.10), 2) == 6.94
    assert ema.sigma_rel_to_gamma(12**-0.5) == pytest.approx(0, abs=1e-14)
    assert ema.gamma_to_sigma_rel(0) == 12**-0.5


@proves("EMA-2")
@given(lengths, times)
def test_profile_has_unit_integral_and_its_length(s: float, end: float) -> None:
    """Integral 1 and standard deviation sigma_rel t, by mpmath's quadrature."""

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


@proves("EMA-3")
@given(lengths, st.lists(st.floats(0.1, 100), min_size=1, max_size=20), draw.seeds)
def test_updates_integrate_the_profile(s: float, deltas: list[float], seed: int) -> None:
    """For any sequence of t_delta. Each update rounds by 2 eps of its weight, and beta by gamma eps."""
    edges = np.cumsum([0.0, *deltas])
    weights = np.random.default_rng(seed).standard_normal((len(deltas), 3))
    wanted = segment_weights(edges, s, edges[-1]) @ weights
    got = track(weights, edges, s)[-1]
    allowed = 8 * EPS * len(deltas) * (1 + ema.sigma_rel_to_gamma(s)) * np.abs(weights).max()
    assert np.allclose(got, wanted, rtol=0, atol=allowed)


@proves("EMA-3")
@given(lengths, st.integers(2, 6), st.floats(0.5, 20))
def test_updates_are_the_quadrature_of_the_profile(s: float, steps: int, delta: float) -> None:
    """As above, with ema.profile integrated numerically instead of in closed form."""
    edges = delta * np.arange(steps + 1.0)
    share = [
        float(mpmath.quad(lambda u: ema.profile(float(u), end_time=float(edges[-1]), sigma_rel=s), [a, b]))
        for a, b in pairwise(edges)
    ]
    assert np.allclose(track(np.eye(steps), edges, s)[-1], share, rtol=0, atol=1e-9)


@proves("EMA-3")
@given(lengths, st.floats(0, 1e6), st.floats(0.1, 1e3), st.integers(1, 12))
def test_many_updates_are_one(s: float, start: float, delta: float, count: int) -> None:
    """k updates of t_delta with the same weight equal one update of k t_delta: time counts images, not steps."""
    keep = 1.0
    for i in range(1, count + 1):
        keep *= ema.beta(s, t_next=start + i * delta, t_delta=delta) if start or i > 1 else 0.0
    once = ema.beta(s, t_next=start + count * delta, t_delta=count * delta) if start else 0.0
    gamma = ema.sigma_rel_to_gamma(s)
    assert keep == pytest.approx(once, abs=16 * EPS * (1 + gamma) * count * (1 + start / delta))


@proves("EMA-3")
@given(lengths, st.floats(1e-3, 1e3), draw.seeds)
def test_averages_are_self_similar_and_linear(s: float, unit: float, seed: int) -> None:
    """The unit of time does not matter, and the average of a linear combination is that combination of averages."""
    edges = np.cumsum([0.0, *np.random.default_rng(seed).uniform(0.1, 10, 8)])
    a, b = np.random.default_rng(seed + 1).standard_normal((2, 8, 3))
    allowed = 8 * EPS * 8 * (1 + ema.sigma_rel_to_gamma(s)) * 3 * max(np.abs(a).max(), np.abs(b).max())
    assert np.allclose(track(a, edges * unit, s), track(a, edges, s), rtol=0, atol=allowed)
    blend = 2 * track(a, edges, s) - track(b, edges, s)
    assert np.allclose(track(2 * a - b, edges, s), blend, rtol=0, atol=allowed)


@proves("EMA-9")
@given(half_lives, st.lists(st.floats(0.1, 100), min_size=1, max_size=20), draw.seeds)
def test_traditional_updates_integrate_their_profile(h: float, deltas: list[float], seed: int) -> None:
    """For any sequence of t_delta. An update rounds by a few eps, and times by eps in the exponent."""
    edges = np.cumsum([0.0, *deltas])
    weights = np.random.default_rng(seed).standard_normal((len(deltas), 3))
    wanted = segment_weights(edges, Length.half_life(h), edges[-1]) @ weights
    allowed = 8 * EPS * len(deltas) * (1 + edges[-1] / h) * np.abs(weights).max()
    assert np.allclose(track(weights, edges, Length.half_life(h))[-1], wanted, rtol=0, atol=allowed)


@proves("EMA-9")
@given(half_lives, st.integers(2, 6), st.floats(0.5, 20))
def test_traditional_updates_are_the_quadrature_of_their_profile(h: float, steps: int, delta: float) -> None:
    """As above, with the profile integrated numerically over pieces of one half-life."""
    edges, length = delta * np.arange(steps + 1.0), Length.half_life(h)
    profile = length.profile(float(edges[-1]))
    share = [
        float(
            mpmath.quad(
                lambda u: float(profile(np.asarray(float(u)))), np.linspace(a, b, 2 + int((b - a) / h)).tolist()
            )
        )
        for a, b in pairwise(edges)
    ]
    assert sum(share) == pytest.approx(1, abs=1e-9)
    assert np.allclose(track(np.eye(steps), edges, length)[-1], share, rtol=0, atol=1e-9)


@proves("EMA-9")
@given(st.floats(0.5, 1e5), lengths)
def test_lengths_read_back_from_their_text(h: float, s: float) -> None:
    """A length reads back from its key, as it is in file formats; a half-life never equals a sigma_rel."""
    both = (Length.half_life(h), Length.of(s))
    assert tuple(Length.of(length.key) for length in both) == both
    assert (both[0].key, both[1].key) == (f"HalfLife({h!r})", repr(s))
    assert [length.relative for length in both] == [False, True]
    assert Length.half_life(s) != Length.of(s)
    assert len({*both, *both}) == 2


@proves("API-4", "EMA-9")
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_half_life_is_a_positive_time(value: float) -> None:
    with pytest.raises(InputError, match="half_life must be positive and finite, got"):
        Length.half_life(value)


@proves("EMA-3", "EMA-9")
@given(lengths.map(Length.of) | half_lives.map(Length.half_life), times)
def test_first_update_copies(length: Length, t: float) -> None:
    """beta is exactly 0 at t_delta = t_next."""
    assert length.beta(t_next=t, t_delta=t) == 0


@proves("EMA-4")
@given(lengths, lengths, times, st.floats(0.05, 1), st.booleans())
def test_inner_product_is_accurate_and_symmetric(
    s_a: float, s_b: float, later: float, ratio: float, swap: bool
) -> None:
    """Oracle: Eq. 151 in 30 digits. The tolerance is 64 eps times the exponent gamma."""
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


@proves("EMA-4")
@given(st.floats(0.03, 0.28), st.floats(0.03, 0.28), st.floats(0.5, 1))
def test_inner_product_is_the_quadrature_of_profiles(s_a: float, s_b: float, ratio: float) -> None:
    """Oracle: numerical integration of ema.profile, which does not use Eq. 151."""

    def product(u: Any) -> float:
        a = ema.profile(float(u), end_time=ratio, sigma_rel=s_a)
        return a * ema.profile(float(u), end_time=1.0, sigma_rel=s_b)

    wanted = float(mpmath.quad(product, [0, ratio / 2, ratio * 0.9, ratio]))
    got = ema.inner_product(time_a=ratio, sigma_rel_a=s_a, time_b=1.0, sigma_rel_b=s_b)
    assert got == pytest.approx(wanted, rel=1e-8)


@proves("EMA-4")
def test_inner_product_neither_overflows_nor_underflows() -> None:
    """At times whose powers overflow float64."""
    got = ema.inner_product(time_a=2e9, sigma_rel_a=0.001, time_b=2e9, sigma_rel_b=0.001)
    gamma = ema.sigma_rel_to_gamma(0.001)
    assert got == pytest.approx((gamma + 1) ** 2 / (2 * gamma + 1) / 2e9, rel=1e-10)


@proves("API-4", "EMA-3")
@pytest.mark.parametrize(
    ("t_next", "t_delta", "message"),
    [
        (0, 1, "t_next must be positive"),
        (1, 0, "t_delta must be positive"),
        (1, 2, "t_delta / t_next must be at most 1"),
    ],
)
def test_beta_refuses(t_next: float, t_delta: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ema.beta(0.1, t_next=t_next, t_delta=t_delta)
