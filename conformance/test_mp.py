"""Magnitude-preserving layers: their definitions written another way, and their statistics (SPEC MP).

NumPy float64 throughout: test_libraries.py proves that every library answers the same.
"""

from math import pi, sqrt
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.clauses import proves
from edm2_core import mp, reference
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")
LARGEST = float(np.finfo(np.float32).max)
E = 1e-4  # the constant in normalize


def rms(x: np.ndarray, axis: Any = None, keepdims: bool = False) -> np.ndarray:
    return np.sqrt(np.mean(x * x, axis=axis, keepdims=keepdims))


def unit(seed: int, *shape: int) -> np.ndarray:
    """Gaussian values scaled to an rms of exactly 1."""
    x = np.random.default_rng(seed).standard_normal(shape)
    return x / rms(x)


@proves("MP-1")
@given(draw.numbers(*draw.IMAGES), st.sampled_from([None, 1, 0, -1, (1, 2), (2, 3)]))
def test_normalize_is_division_by_rms(x: np.ndarray, axis: Any) -> None:
    x = x.astype(np.float64)
    over = rms(x, axis=(1, 2, 3) if axis is None else axis, keepdims=True)
    assert np.allclose(mp.normalize(x, axis=axis), x / (E + over), rtol=16 * EPS, atol=0)


@proves("MP-1")
@given(draw.seeds, st.floats(1e-6, 1e6))
def test_normalize_gives_unit_rms(seed: int, scale: float) -> None:
    """The result has unit rms, not unit norm; less where the input is as small as eps."""
    x = unit(seed, *draw.IMAGES) * scale
    assert np.allclose(rms(mp.normalize(x), (1, 2, 3)), rms(x, (1, 2, 3)) / (E + rms(x, (1, 2, 3))), rtol=16 * EPS)


@proves("MP-1", "API-4")
def test_normalize_of_zeros_and_of_a_vector() -> None:
    assert not mp.normalize(np.zeros((2, 3))).any()
    with pytest.raises(InputError, match=r"needs two or more, got shape \(3,\): give axis"):
        mp.normalize(np.zeros(3))


@proves("MP-2")
@given(st.floats(-LARGEST, LARGEST / 2, width=32))
def test_mp_silu_is_x_times_sigmoid(x: float) -> None:
    """Oracle: 60-digit arithmetic, at every float32 whose result is finite. silu is the same without 0.596."""
    with mpmath.workdps(60):
        wanted = mpmath.mpf(x) / (1 + mpmath.exp(-mpmath.mpf(x)))
        exact = {mp.silu: float(wanted), mp.mp_silu: float(wanted / mpmath.mpf("0.596"))}
    for function, value in exact.items():
        assert function(x) == pytest.approx(value, rel=8 * EPS, abs=1e-300)
        assert np.isfinite(function(np.float32(x).reshape(1))).all()


@proves("MP-2")
def test_mp_silu_keeps_gaussian_magnitude() -> None:
    """By quadrature, the rms of mp_silu over N(0, 1) is 1 to the three digits of 0.596."""
    mean_square = mpmath.quad(lambda x: mp.mp_silu(float(x)) ** 2 * mpmath.npdf(x), [-12, 0, 12])
    assert float(mpmath.sqrt(mean_square)) == pytest.approx(1, abs=1e-3)


@proves("MP-3")
@given(draw.seeds, st.floats(0, 1))
def test_mp_sum_keeps_magnitude(seed: int, t: float) -> None:
    """Orthogonal inputs of unit rms give unit rms, and contribute 1 - t : t."""
    a, b = unit(seed, 60), unit(seed + 1, 60)
    b = b - a * np.mean(a * b)
    b = b / rms(b)
    out = mp.mp_sum(a, b, t=t)
    assert rms(out) == pytest.approx(1, rel=64 * EPS)
    assert np.mean(out * a) * t == pytest.approx(np.mean(out * b) * (1 - t), abs=64 * EPS)
    assert np.mean(out * b) >= -64 * EPS


@proves("MP-4")
@given(draw.seeds, st.floats(0, 1), st.integers(1, 9), st.integers(1, 9))
def test_mp_cat_shares_energy(seed: int, t: float, size_a: int, size_b: int) -> None:
    """At any sizes."""
    a, b = unit(seed, 2, size_a, 3, 3), unit(seed + 1, 2, size_b, 3, 3)
    out = mp.mp_cat(a, b, axis=1, t=t)
    energy_a, energy_b = np.sum(out[:, :size_a] ** 2), np.sum(out[:, size_a:] ** 2)
    assert rms(out) == pytest.approx(1, rel=64 * EPS)
    assert energy_a * t**2 == pytest.approx(energy_b * (1 - t) ** 2, rel=256 * EPS, abs=1e-300)
    assert np.sum(out[:, :size_a] * a) >= 0
    assert np.sum(out[:, size_a:] * b) >= 0


@proves("MP-5")
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=4), st.floats(-100, 100), st.integers(3, 40))
def test_mp_fourier_keeps_magnitude_over_phases(x: list[float], freq: float, count: int) -> None:
    """The mean of 2 cos^2 over three or more evenly spaced phases is exactly 1, at every x."""
    phases = 2 * pi * np.arange(count) / count
    out = mp.mp_fourier(np.asarray(x), np.full(count, freq), phases)
    assert out.shape == (len(x), count)
    assert np.allclose(np.mean(out**2, axis=-1), 1, atol=4 * EPS * (1 + 50 * 100))
    assert np.allclose(out[:, 0], sqrt(2) * np.cos(np.asarray(x) * freq), atol=4 * EPS * (1 + 50 * 100))


@proves("MP-6")
@given(draw.weights(), st.floats(-3, 3))
def test_mp_weight_rows(w: np.ndarray, gain: float) -> None:
    """Rows have norm gain, up to eps, and keep their direction."""
    w = w.astype(np.float64)
    rows, out = w.reshape(len(w), -1), mp.mp_weight(w, gain=gain).reshape(len(w), -1)
    size = rms(rows, 1)
    assert np.allclose(np.linalg.norm(out, axis=1), abs(gain) * size / (E + size), rtol=32 * EPS, atol=1e-30)
    assert np.allclose(out, rows * (gain / sqrt(rows.shape[1])) / (E + size)[:, None], rtol=32 * EPS, atol=1e-30)
    assert np.array_equal(mp.mp_weight(w, gain=np.asarray(gain)), mp.mp_weight(w, gain=gain))


@proves("MP-6")
@given(draw.seeds, st.floats(0.1, 3))
def test_layers_keep_variance_on_expectation(seed: int, gain: float) -> None:
    """For fixed weights and N(0, 1) inputs each output of a linear layer, and each interior pixel of a
    convolution, is N(0, gain^2). Samples counted: independent ones only (batch; one pixel in each 3x3)."""
    rng = np.random.default_rng(seed)
    share = (1 + E) ** 2  # eps leaves rows of rms 1 at 1 / (1 + eps), those of fan-in 27 nearly so
    x, w = rng.standard_normal((400, 27)), rng.standard_normal((1, 27)) * 10
    out = reference.linear(x, w, gain=gain) / gain
    assert np.mean(out**2) * share == pytest.approx(1, abs=tolerance.mean_square(400) + E)
    x, w = rng.standard_normal((6, 3, 14, 14)), rng.standard_normal((1, 3, 3, 3)) * 10
    apart = reference.conv(x, w, gain=gain)[:, :, 1:-1:3, 1:-1:3] / gain
    assert np.mean(apart**2) * share == pytest.approx(1, abs=tolerance.mean_square(apart.size) + E)


@proves("MP-7")
@given(draw.weights(), draw.seeds)
def test_gradient_of_mp_weight_is_orthogonal(w: np.ndarray, seed: int) -> None:
    """Scaling w changes the result by the factor e / (e + rms) only."""
    rows = w.astype(np.float64).reshape(len(w), -1)
    rows = rows[rms(rows, 1) > 1e-2]
    if not len(rows):
        return
    upstream = np.random.default_rng(seed).standard_normal(rows.shape)
    h = 1e-5
    moved = (mp.mp_weight(rows * (1 + h)) - mp.mp_weight(rows * (1 - h))) / (2 * h)  # w . gradient, row by row
    along = np.sum(upstream * moved, axis=1)
    share = E / (E + rms(rows, 1))
    wanted = share * np.sum(upstream * mp.mp_weight(rows), axis=1)
    size = np.linalg.norm(upstream, axis=1)  # of the gradient at the output; |mp_weight| is 1
    assert (np.abs(along) <= (share + 8 * EPS / h) * size).all()
    assert np.allclose(along, wanted, atol=(8 * EPS / h + h * h) * size.max())


@proves("MP-8")
@given(draw.weights())
def test_forcing_is_idempotent(w: np.ndarray) -> None:
    """In float32, for rows whose rms is far above eps."""
    w = w[rms(w.reshape(len(w), -1).astype(np.float64), 1) > 1]
    if not len(w):
        return
    once = mp.force_weight_norm(w)
    fan_in = once[0].size
    # rms r = 1 / (1 + e / rms(w)) goes to 1 / (1 + e / r): second order in e where rms(w) is 1, first where it is large
    settled = mp.force_weight_norm(once)
    assert np.allclose(settled, once, rtol=E + 8 * tolerance.eps("float32"))
    again = mp.force_weight_norm(settled)
    assert np.allclose(again, settled, rtol=2 * E**2 + (4 + tolerance.reduction(fan_in)) * tolerance.eps("float32"))
    assert np.allclose(np.linalg.norm(again.reshape(len(w), -1), axis=1), sqrt(fan_in) / (1 + E), rtol=1e-5)


@proves("MP-8")
@given(draw.weights(), st.floats(0.1, 10))
def test_forcing_does_not_change_the_layer(w: np.ndarray, gain: float) -> None:
    """The effective weight before and after forcing is the same, up to eps."""
    w = w.astype(np.float64)
    w = w[rms(w.reshape(len(w), -1), 1) > 1]
    if len(w):
        forced = mp.mp_weight(mp.force_weight_norm(w), gain=gain)
        assert np.allclose(forced, mp.mp_weight(w, gain=gain), rtol=2 * E)


def down_matrix(size: int, taps: tuple[float, ...]) -> np.ndarray:
    """y[i] = sum_k f[k] x[2 i + k - (n/2 - 1)] as a matrix [size / 2, size], zeros beyond the border."""
    matrix = np.zeros((size // 2, size))
    for i in range(size // 2):
        for k, tap in enumerate(taps):
            j = 2 * i + k - (len(taps) // 2 - 1)
            if 0 <= j < size:
                matrix[i, j] += tap / sum(taps)
    return matrix


filters = st.lists(st.floats(0.125, 2), min_size=1, max_size=4).flatmap(
    lambda half: st.permutations(half).map(lambda other: (*half, *other))
)


@proves("MP-9")
@given(draw.seeds, filters, st.integers(1, 4), st.integers(1, 4))
def test_resample_is_its_matrix(seed: int, taps: tuple[float, ...], height: int, width: int) -> None:
    """Down applies the filter's matrix along each axis, up four times its transpose, for asymmetric filters too."""
    x = np.random.default_rng(seed).standard_normal((2, 3, 2 * height, 2 * width))
    vertical, horizontal = down_matrix(2 * height, taps), down_matrix(2 * width, taps)
    down = np.einsum("ij,ncjk,lk->ncil", vertical, x, horizontal)
    assert np.allclose(mp.resample(x, mode="down", filter=taps), down, atol=32 * EPS * np.abs(x).max())
    up = 4 * np.einsum("ji,ncjk,kl->ncil", vertical, down, horizontal)
    assert np.allclose(mp.resample(down, mode="up", filter=taps), up, atol=64 * EPS * np.abs(x).max())
    assert mp.resample(x, mode="keep", filter=taps) is x


@proves("MP-9")
@given(draw.numbers(*draw.IMAGES))
def test_box_down_after_up_is_identity(x: np.ndarray) -> None:
    """Exactly, because the mean of four equal numbers is exact."""
    assert np.array_equal(mp.resample(mp.resample(x, mode="up"), mode="down"), x)


@proves("MP-9")
@pytest.mark.parametrize("mode", ["up", "down"])
@given(value=st.floats(-100, 100), half=st.lists(st.floats(0.125, 2), min_size=1, max_size=3))
def test_constants_stay_constant(mode: Any, value: float, half: list[float]) -> None:
    """Away from the border; everywhere for the box."""
    taps, x = (*half, *half[::-1]), np.full((1, 2, 24, 24), value)
    edge = len(half) if len(half) > 1 else 0
    out = mp.resample(x, mode=mode, filter=taps)
    inner = out[:, :, edge : out.shape[2] - edge, edge : out.shape[3] - edge]
    assert inner.size
    assert np.allclose(inner, value, rtol=32 * EPS)


@proves("API-4", "MP-9")
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ((1, 1, 3, 4), {"mode": "down"}, r"even height and width, got 3x4: pad the images"),
        ((1, 1, 4, 4), {"mode": "half"}, r"must be 'keep', 'up' or 'down', got 'half'"),
        ((1, 1, 4, 4), {"mode": "up", "filter": (1, 2, 1)}, r"even number of taps .* got \(1, 2, 1\)"),
        ((1, 1, 4, 4), {"mode": "up", "filter": (1, -1)}, r"nonzero sum, got \(1, -1\)"),
    ],
)
def test_resample_refuses(x: tuple[int, ...], options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mp.resample(np.zeros(x), **options)
