"""Preconditioning, loss and learning rate: formulas, and the properties they are derived from (SPEC PRE, LOSS, LR)."""

from math import exp, inf, log, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.pipeline.data.batches import label_uniforms
from backends.pipeline.data.seeds import bits
from conformance import strategies as draw
from conformance import tolerance
from conformance.clauses import proves
from edm2_core import loss, precond, schedule
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")
sigmas = st.floats(1e-3, 1e3)
deviations = st.floats(0.05, 5)


@proves("PRE-1")
@given(sigmas, deviations)
def test_preconditioning_is_the_papers(sigma: float, sd: float) -> None:
    """Eqs. 5-8 as printed."""
    c = precond.precondition(sigma, sigma_data=sd)
    wanted = (
        sd**2 / (sigma**2 + sd**2),
        sigma * sd / sqrt(sigma**2 + sd**2),
        1 / sqrt(sigma**2 + sd**2),
        0.25 * log(sigma),
    )
    assert tuple(c) == pytest.approx(wanted, rel=8 * EPS)


@proves("PRE-2")
@given(sigmas, deviations)
def test_preconditioning_gives_unit_variance(sigma: float, sd: float) -> None:
    """Of the network's input, and of its training target (y (1 - c_skip) - c_skip n) / c_out."""
    c = precond.precondition(sigma, sigma_data=sd)
    assert c.c_in**2 * (sigma**2 + sd**2) == pytest.approx(1, rel=8 * EPS)
    target = ((1 - c.c_skip) ** 2 * sd**2 + c.c_skip**2 * sigma**2) / c.c_out**2
    # 1 - c_skip cancels where sigma is much smaller than sd
    assert target == pytest.approx(1, rel=16 * EPS * (1 + (sd / sigma) ** 2))


@proves("PRE-1")
@given(draw.seeds, deviations, st.sampled_from([(3,), (2, 4, 4)]))
def test_any_backbone_becomes_a_denoiser(seed: int, sd: float, shape: tuple[int, ...]) -> None:
    """Eq. 4, of data of any shape: a backbone that answers (y - c_skip x) / c_out gives y; it is called with c_in x and
    c_noise [N]."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 5, *shape))
    sigma = np.exp(rng.standard_normal((5, *[1] * len(shape))))
    root = np.sqrt(sigma**2 + sd**2)

    def backbone(scaled: np.ndarray, c_noise: np.ndarray) -> np.ndarray:
        assert np.allclose(scaled, x / root, rtol=16 * EPS)
        assert np.allclose(c_noise, np.log(sigma.reshape(5)) / 4, rtol=0, atol=16 * EPS)
        return (y - sd**2 / root**2 * x) / (sigma * sd / root)

    assert np.allclose(precond.denoise(backbone, x, sigma, sigma_data=sd), y, rtol=0, atol=64 * EPS * np.abs(x).max())


@proves("LOSS-1")
@given(st.floats(-6, 6), st.floats(-2, 2), st.floats(0.1, 2))
def test_noise_level(z: float, mean: float, std: float) -> None:
    """Eq. 16; the defaults are those of CONFIG G."""
    assert loss.noise_level(z, P_mean=mean, P_std=std) == pytest.approx(exp(mean + std * z), rel=64 * EPS)
    assert loss.noise_level(z) == pytest.approx(exp(-0.4 + z), rel=64 * EPS)


@proves("LOSS-2")
@given(sigmas, deviations)
def test_weight_is_inverse_square_of_c_out(sigma: float, sd: float) -> None:
    """So that the weighted loss is the squared error of the network's output F."""
    c_out = precond.precondition(sigma, sigma_data=sd).c_out
    assert loss.weight(sigma, sigma_data=sd) == pytest.approx(c_out**-2, rel=16 * EPS)


@proves("LOSS-3")
@given(draw.seeds, deviations, st.floats(-3, 3))
def test_loss_per_element(seed: int, sd: float, u: float) -> None:
    """Eq. 21, one element at a time."""
    rng = np.random.default_rng(seed)
    denoised, images = rng.standard_normal((2, 3, 2, 2, 2))
    sigma, logvar = np.exp(rng.standard_normal((3, 1, 1, 1))), u + rng.standard_normal((3, 1, 1, 1))
    got = loss.loss(denoised, images, sigma, logvar, sigma_data=sd)
    assert got.shape == images.shape
    for (n, c, h, w), value in np.ndenumerate(got):
        at, v = float(sigma[n, 0, 0, 0]), float(logvar[n, 0, 0, 0])
        error = (denoised[n, c, h, w] - images[n, c, h, w]) ** 2
        part = (at**2 + sd**2) / (at * sd) ** 2 / exp(v) * error
        assert value == pytest.approx(part + v, abs=64 * EPS * (part + abs(v)))


@proves("LOSS-3")
@given(draw.seeds, sigmas)
def test_loss_is_least_at_the_true_uncertainty(seed: int, sigma: float) -> None:
    """The minimum is at exp(u) = weighted mean squared error, where the loss is 1 + u."""
    denoised, images = np.random.default_rng(seed).standard_normal((2, 1, 2, 4, 4))
    level = np.full((1, 1, 1, 1), sigma)
    best = log(loss.weight(sigma) * float(np.mean((denoised - images) ** 2)))

    def mean_loss(u: float) -> float:
        return float(np.mean(loss.loss(denoised, images, level, np.full((1, 1, 1, 1), u))))

    assert mean_loss(best) == pytest.approx(1 + best, abs=1e-12 * (1 + abs(best)))
    assert mean_loss(best) < min(mean_loss(best + 0.01), mean_loss(best - 0.01))


@proves("LOSS-4")
@given(st.integers(1, 9), st.integers(1, 5), st.floats(0, 0.999), draw.seeds)
def test_labels_are_dropped_by_row(n: int, label_dim: int, probability: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, uniform = np.eye(label_dim)[rng.integers(label_dim, size=n)], rng.random(n)
    before = labels.copy()
    got = loss.drop_labels(labels, uniform, probability=probability)
    for row, label, u in zip(got, before, uniform, strict=True):
        assert np.array_equal(row, 0 * label if u < probability else label)
    assert np.array_equal(labels, before)


@proves("LOSS-4")
@given(st.integers(1, 50), st.integers(0, 120), st.integers(1, 60), st.integers(0, 3))
def test_uniform_numbers_of_labels_depend_on_seed_and_position_alone(
    size: int, start: int, count: int, seed: int
) -> None:
    """Word i of the stream of (seed, purpose, epoch), which any port can draw again."""
    got = label_uniforms(start=start, count=count, size=size, seed=seed)
    for position, u in zip(range(start, start + count), got, strict=True):
        word = int(bits(seed, "label dropout", position // size).random_raw(size)[position % size])
        assert u == (word >> 11) / 2**53


@proves("LR-1")
@given(st.floats(0, 1e10), st.integers(1, 4096), st.floats(1e-4, 1), st.floats(1, 1e6), st.floats(1, 1e8))
def test_learning_rate(nimg: float, batch: int, ref_lr: float, ref_batches: float, rampup: float) -> None:
    """Eq. 67 with the ramp, term by term."""
    wanted = ref_lr
    if nimg > ref_batches * batch:
        wanted *= sqrt(ref_batches * batch / nimg)
    if nimg < rampup:
        wanted *= nimg / rampup
    got = schedule.learning_rate(nimg, batch=batch, ref_lr=ref_lr, ref_batches=ref_batches, rampup_nimg=rampup)
    assert got == pytest.approx(wanted, rel=8 * EPS)


@proves("LR-1")
@pytest.mark.parametrize("never", [0, inf])
def test_learning_rate_without_decay_or_ramp(never: float) -> None:
    options: Any = {"batch": 2048, "ref_lr": 0.01}
    assert schedule.learning_rate(10**9, ref_batches=never, rampup_nimg=0, **options) == 0.01
    assert schedule.learning_rate(5, ref_batches=never, rampup_nimg=10, **options) == 0.005


@proves("API-4", "LR-1")
@pytest.mark.parametrize("change", [{"nimg": -1}, {"batch": 0}, {"ref_batches": -1}, {"rampup_nimg": -1}])
def test_learning_rate_refuses(change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"nimg": 1, "batch": 1, "ref_lr": 1, "ref_batches": 1, "rampup_nimg": 1} | change
    with pytest.raises(InputError, match=f"got nimg .*{next(iter(change))} {next(iter(change.values()))}|got nimg -1"):
        schedule.learning_rate(options.pop("nimg"), **options)
