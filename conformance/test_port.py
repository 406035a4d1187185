"""Ports against the float64 reference, on random networks, through their PORT alone (SPEC NET, STEP, SAMPLE).

A port's arithmetic is float32. Oracles are edm2_core.reference on float64 NumPy, finite differences of it, and, for
whole gradients and training steps, PyTorch's derivative of the same reference on float64 tensors.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.ports import each_eager_port
from conformance.strategies import Batch, wide
from edm2_core import ema, mp, reference, sampler
from edm2_core.network import NetworkConfig, plan

pytestmark = each_eager_port
GRADIENT_SHARE = 3  # a tensor's share of the error may be that many times its share of the norm
Params = dict[str, np.ndarray]


def trained_names(config: NetworkConfig) -> list[str]:
    return [name for name, parameter in plan(config).parameters.items() if parameter.trained]


# ---- the reference


def check_like_float32(array: Any, shape: tuple[int, ...]) -> None:
    assert isinstance(array, np.ndarray)
    assert (array.dtype, array.shape) == (np.float32, shape)


@given(draw.configs(), draw.seeds)
def test_denoise(port: Any, config: NetworkConfig, seed: int) -> None:
    """NET-5 NET-6: any network, at any noise level; the uncertainty where it is near 0 to that of a unit sum."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed, P_std=2.0)
    denoised, logvar = port.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    check_like_float32(denoised, batch.images.shape)
    check_like_float32(logvar, batch.sigma.shape)
    wanted, u = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, batch.labels)))
    assert tolerance.relative(denoised, wanted) <= tolerance.network(config)
    assert tolerance.relative(logvar, u, floor=1.0) <= tolerance.network(config)


@draw.fewer(2)
@given(draw.configs(), draw.seeds)
def test_network_answer(port: Any, config: NetworkConfig, seed: int) -> None:
    """NET-5: F itself, by itself: (D - c_skip x) / c_out at sigma = 80, where D is nearly all of it."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    sigma = np.full_like(batch.sigma, 80.0)
    x = batch.unit_noise * sigma
    denoised, _ = port.denoise(config, params, x, sigma, batch.labels)
    wanted, _ = reference.denoise(config, *wide((params, x, sigma, batch.labels)))
    skip = config.sigma_data**2 / (80.0**2 + config.sigma_data**2) * wide(x)
    assert tolerance.relative(denoised - skip, wanted - skip) <= 2 * tolerance.network(config)


@draw.fewer(4)
@given(draw.configs(), draw.seeds)
def test_batch_independence(port: Any, config: NetworkConfig, seed: int) -> None:
    """NET-7"""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed, size=3)
    together, u = port.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    for i in range(3):
        x, sigma = batch.noisy[i : i + 1], batch.sigma[i : i + 1]
        labels = None if batch.labels is None else batch.labels[i : i + 1]
        alone, u_alone = port.denoise(config, params, x, sigma, labels)
        assert tolerance.relative(alone, together[i : i + 1]) <= tolerance.network(config)
        assert tolerance.relative(u_alone, u[i : i + 1], floor=1.0) <= tolerance.network(config)


@draw.fewer(4)
@given(draw.configs(labels=True), draw.seeds)
def test_no_label_is_the_zero_label(port: Any, config: NetworkConfig, seed: int) -> None:
    """NET-8"""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    without, _ = port.denoise(config, params, batch.noisy, batch.sigma, None)
    zero, _ = port.denoise(config, params, batch.noisy, batch.sigma, np.zeros((2, config.label_dim), np.float32))
    assert tolerance.relative(without, zero) <= tolerance.network(config)


@given(draw.configs(narrowest=draw.BACKWARD), draw.seeds)
def test_gradient_along_random_directions(port: Any, config: NetworkConfig, seed: int) -> None:
    """STEP-1 LOSS-3: against central differences of the float64 reference along Gaussian directions v.

    (g + error) . v - g . v is N(0, |error|^2): within 6 of its standard deviations. The difference itself is good to
    h^2 and eps / h, given that nothing is clipped: it would straddle the bend (test_gradients goes there).
    """
    config = replace(config, clip_act=None)
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    loss, gradients = port.loss_and_gradients(config, params, *batch)
    check_like_float32(loss, batch.images.shape)
    assert set(gradients) == set(trained_names(config))
    exact = wide(params)
    allowed = tolerance.gradient(config, batch.sigma, batch.images)
    assert tolerance.relative(loss, reference.loss(config, exact, *wide(tuple(batch)))) <= allowed

    def objective(direction: Params, h: float) -> float:
        moved = {name: value + h * direction.get(name, 0.0) for name, value in exact.items()}
        return float(np.sum(reference.loss(config, moved, *wide(tuple(batch))))) / len(batch.images)

    norm = sqrt(sum(float(np.sum(wide(g) ** 2)) for g in gradients.values()))
    rng, h = np.random.default_rng(seed), 1e-5
    for _ in range(2):
        v = {name: rng.standard_normal(gradient.shape) for name, gradient in gradients.items()}
        along = sum(float(np.sum(wide(g) * v[name])) for name, g in gradients.items())
        wanted = (objective(v, h) - objective(v, -h)) / (2 * h)
        assert abs(along - wanted) <= 6 * allowed * norm + 1e-5 * norm


def torch_gradients(config: NetworkConfig, params: Params, batch: Batch) -> tuple[float, Params]:
    """The mean loss and the gradient of loss.sum() / N: the float64 reference, differentiated by PyTorch."""
    torch = pytest.importorskip("torch", reason="the oracle of whole gradients differentiates with PyTorch")
    names = trained_names(config)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in params.items()}
    for name in names:
        tensors[name].requires_grad_()
    inputs = [None if array is None else torch.tensor(array, dtype=torch.float64) for array in batch]
    loss = reference.loss(config, tensors, *inputs)
    gradients = torch.autograd.grad(loss.sum() / len(batch.images), [tensors[name] for name in names])
    return float(loss.detach().mean()), {name: g.numpy() for name, g in zip(names, gradients, strict=True)}


@draw.fewer(2)
@given(draw.configs(narrowest=draw.BACKWARD), draw.seeds)
def test_gradients(port: Any, config: NetworkConfig, seed: int) -> None:
    """STEP-1: tensor by tensor."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    _, gradients = port.loss_and_gradients(config, params, *batch)
    _, wanted = torch_gradients(config, params, batch)
    worst, name = tolerance.relative_all(gradients, wanted, floor=tolerance.gradient_floor(wanted))
    assert worst <= GRADIENT_SHARE * tolerance.gradient(config, batch.sigma, batch.images), name


class Trained(NamedTuple):
    """What a training run comes to, and how far float32 may be off: in each loss, and in each element of a weight."""

    losses: list[float]
    weights: Params
    averages: dict[float, Params]
    loss_slack: list[float]
    weight_slack: Params


def train_in_float64(
    config: NetworkConfig,
    params: Params,
    batches: Sequence[Batch],
    *,
    learning_rates: Sequence[float],
    betas: tuple[float, float],
    sigma_rels: Sequence[float],
) -> Trained:
    """STEP-2, in so many words."""
    table, weights = plan(config).parameters, wide(params)
    names = trained_names(config)
    first, second, slack = ({name: np.zeros_like(weights[name]) for name in names} for _ in range(3))
    averages: dict[float, Params] = {s: {} for s in sigma_rels}
    losses, loss_slack, nimg = [], [], 0
    for step, (batch, lr) in enumerate(zip(batches, learning_rates, strict=True), start=1):
        for name in names:
            if table[name].normalized:
                weights[name] = mp.force_weight_norm(weights[name])
        loss, gradients = torch_gradients(config, weights, batch)
        allowed, floor = tolerance.gradient(config, batch.sigma, batch.images), tolerance.gradient_floor(gradients)
        losses.append(loss)
        moved = sum(float(np.sum(np.abs(gradients[name]) * slack[name])) for name in names)
        loss_slack.append(allowed * max(1.0, abs(loss)) + moved / batch.images[0].size)
        for name in names:
            gradient = gradients[name]
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            root = np.sqrt(second[name] / (1 - betas[1] ** step)) + 1e-8
            weights[name] = weights[name] - lr * first[name] / (1 - betas[0] ** step) / root
            error = GRADIENT_SHARE * allowed * max(float(np.linalg.norm(gradient.ravel())), floor)
            slack[name] = slack[name] + tolerance.adam(gradient, root, lr=lr, error=error)
        nimg += len(batch.images)
        for s in sigma_rels:
            keep = ema.beta(s, t_next=nimg, t_delta=len(batch.images))
            previous = averages[s] or weights
            averages[s] = {name: keep * previous[name] + (1 - keep) * weights[name] for name in weights}
    return Trained(losses, weights, averages, loss_slack, slack)


@draw.fewer(5)
@given(
    draw.configs(narrowest=draw.BACKWARD),
    draw.seeds,
    st.sampled_from([(0.9, 0.99), (0.8, 0.95)]),
    st.sampled_from([(0.05, 0.10), (0.2,)]),
)
def test_training(
    port: Any, config: NetworkConfig, seed: int, betas: tuple[float, float], sigma_rels: tuple[float, ...]
) -> None:
    """STEP-2 STEP-3: three steps with batches of different sizes and rates."""
    params = draw.random_parameters(config, seed)
    batches = [draw.random_batch(config, seed + i, size=size) for i, size in enumerate((2, 3, 1))]
    options: Any = {"learning_rates": (0.01, 0.02, 0.005), "betas": betas, "sigma_rels": sigma_rels}
    before = {name: value.copy() for name, value in params.items()}
    losses, trained, averages = port.train(config, params, batches, **options)
    assert all(np.array_equal(params[name], value) for name, value in before.items()), "train wrote to its input"
    wanted = train_in_float64(config, params, batches, **options)
    assert [type(loss) for loss in losses] == [float] * 3
    assert (np.abs(np.asarray(losses) - wanted.losses) <= wanted.loss_slack).all(), f"{losses}, {wanted.losses}"
    assert set(averages) == set(sigma_rels)
    for got, want in ((trained, wanted.weights), *((averages[s], wanted.averages[s]) for s in sigma_rels)):
        assert set(got) == set(want)
        for name in want:  # each step rounds the weight, and forcing it a few times more
            rounding = 3 * 8 * tolerance.eps("float32") * float(np.linalg.norm(want[name].ravel()))
            allowed = rounding + float(np.linalg.norm(wanted.weight_slack.get(name, np.zeros(1)).ravel()))
            off = float(np.linalg.norm((got[name] - want[name]).ravel()))
            assert off <= allowed, f"{name} is off by {off:.3g}, allowed {allowed:.3g}"


@draw.fewer(4)
@given(draw.configs(narrowest=draw.BACKWARD), draw.seeds)
def test_first_step(port: Any, config: NetworkConfig, seed: int) -> None:
    """STEP-2 STEP-3: each trained number moves by at most lr; averages copy, Fourier constants stay, bit for bit."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    _, trained, averages = port.train(config, params, [batch], learning_rates=[0.01], sigma_rels=(0.05, 0.10))
    assert all(np.array_equal(average[name], trained[name]) for average in averages.values() for name in params)
    for name, parameter in plan(config).parameters.items():
        if not parameter.trained:
            assert np.array_equal(trained[name], params[name])
        else:
            start = mp.force_weight_norm(wide(params[name])) if parameter.normalized else params[name]
            moved = np.abs(trained[name] - start)
            assert moved.max() <= 0.01 + 16 * tolerance.eps("float32") * np.abs(start).max()


def as_denoiser(config: NetworkConfig, params: Params, labels: Any) -> sampler.Denoiser:
    exact, given = wide(params), wide(labels) if config.label_dim else None

    def denoise(x: Any, sigma: float) -> Any:
        return reference.denoise(config, exact, x, np.full((len(x), 1, 1, 1), sigma), given)[0]

    return denoise


@draw.fewer(4)
@given(draw.configs(), draw.seeds, st.integers(1, 4), st.floats(0.002, 0.1), st.floats(5, 80), st.floats(3, 9))
def test_sample(
    port: Any, config: NetworkConfig, seed: int, n: int, sigma_min: float, sigma_max: float, rho: float
) -> None:
    """SAMPLE-1 SAMPLE-2: any schedule."""
    params, batch = draw.random_parameters(config, seed, max_gain=1.0), draw.random_batch(config, seed)
    noise = batch.unit_noise
    options: Any = {"num_steps": n, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    got = port.sample(config, params, noise, batch.labels, **options)
    check_like_float32(got, noise.shape)
    wanted = sampler.sample(as_denoiser(config, params, batch.labels), wide(noise), **options)
    assert tolerance.relative(got, wanted) <= tolerance.sampled(config, evaluations=2 * n, gain=1.0)


@draw.fewer(4)
@given(draw.configs(), draw.configs(), draw.seeds, st.floats(0, 2), st.floats(0, 40), st.booleans())
def test_sample_with_guidance_and_churn(
    port: Any, config: NetworkConfig, other: NetworkConfig, seed: int, w: float, churn: float, same: bool
) -> None:
    """SAMPLE-4 SAMPLE-5: the guide a network of another config, or of the same (then its parameters are enough)."""
    if same:
        other = config
    other = replace(
        other,
        img_resolution=config.img_resolution,
        img_channels=config.img_channels,
        label_dim=config.label_dim if same else 0,
        channel_mult=config.channel_mult if same else (1,),
        attn_resolutions=config.attn_resolutions if same else (),
        channels_per_head=config.channels_per_head if same else other.model_channels,
    )
    params = draw.random_parameters(config, seed, max_gain=0.5)
    guide = draw.random_parameters(other, seed + 1, max_gain=0.5)
    batch, n = draw.random_batch(config, seed), 3
    noise = batch.unit_noise
    fresh = np.stack([draw.normal(seed + i, *noise.shape) for i in range(n)])
    options: Any = {"num_steps": n, "sigma_max": 20.0, "S_churn": churn, "S_min": 0.01, "S_max": 10.0, "S_noise": 1.01}
    given = guide if same else (other, guide)
    got = port.sample(config, params, noise, batch.labels, guide=given, guidance=w, churn_noise=fresh, **options)
    net, away = as_denoiser(config, params, batch.labels), as_denoiser(other, guide, batch.labels)
    denoise = sampler.guided(net, away, guidance=w)
    wanted = sampler.sample(denoise, wide(noise), churn_noise=wide(fresh), **options)
    allowed = tolerance.sampled(config, evaluations=4 * n, gain=0.5, guidance=w)
    allowed = max(allowed, tolerance.sampled(other, evaluations=4 * n, gain=0.5, guidance=w))
    assert tolerance.relative(got, wanted) <= allowed


@draw.fewer(10)
@given(draw.configs(), draw.seeds)
def test_sample_batch_independence(port: Any, config: NetworkConfig, seed: int) -> None:
    """NET-7 SAMPLE-2: the same noise, the same image, in whatever batch."""
    params, batch = draw.random_parameters(config, seed, max_gain=1.0), draw.random_batch(config, seed, size=3)
    options: Any = {"num_steps": 3, "S_max": inf}
    together = port.sample(config, params, batch.unit_noise, batch.labels, **options)
    labels = None if batch.labels is None else batch.labels[1:2]
    alone = port.sample(config, params, batch.unit_noise[1:2], labels, **options)
    assert tolerance.relative(alone, together[1:2]) <= tolerance.sampled(config, evaluations=5, gain=1.0)
