"""EDM2 from Python in JAX: any backbone with the denoiser, the step and the sampler; what ``load`` gives."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toy_port import PRESET, train

from conformance import tolerance
from edm2_core import precond
from edm2_core.errors import InputError

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")

from backends.jax import api, weights  # noqa: E402
from backends.jax.denoiser import Network, denoiser  # noqa: E402
from backends.jax.ema import power_ema  # noqa: E402
from backends.jax.port import PORT  # noqa: E402
from backends.jax.step import TrainState, draw_batch, make_step  # noqa: E402
from backends.jax.trainer import JaxTrainer  # noqa: E402


def own_backbone(params, x, c_noise, labels, *, key):
    """Two layers on 2-D data, which see the noise level and, where there are some, labels."""
    y = jax.numpy.concatenate([x, c_noise[:, None]], axis=1) @ params["in"]
    y = y if labels is None else y + labels @ params["label"]
    return jax.nn.silu(y) @ params["out"]


def own_params(seed=0):
    shapes = {"in": (3, 16), "label": (4, 16), "out": (16, 2)}
    return {n: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), s) / s[0] ** 0.5
            for i, (n, s) in enumerate(shapes.items())}  # fmt: skip


def test_the_denoiser_of_any_backbone_is_the_preconditioning_around_it():
    x, sigma, params = np.ones((5, 2), np.float32), np.geomspace(0.01, 80, 5, dtype=np.float32)[:, None], own_params()
    denoise = denoiser(own_backbone, sigma_data=0.7, uncertainty=lambda params, c_noise: 3 * c_noise)
    denoised, logvar = jax.jit(denoise)(params, x, sigma)
    c = precond.precondition(sigma, sigma_data=0.7)
    raw = own_backbone(params, x * c.c_in, c.c_noise[:, 0], None, key=None)
    assert tolerance.relative(denoised, c.c_skip * x + c.c_out * raw) < 1e-6
    assert np.allclose(logvar, 3 * c.c_noise, rtol=1e-6)
    assert not np.any(denoiser(own_backbone)(params, x, sigma)[1])


def test_any_backbone_and_optimizer_train_with_the_step():
    """The first update copies what the weights become; losses fall; averages lag behind."""
    denoise, optimizer = denoiser(own_backbone), optax.chain(optax.adam(1e-2), power_ema())
    step = jax.jit(make_step(denoise, optimizer), donate_argnums=0)
    params, key = own_params(), jax.random.key(1)
    state, losses = TrainState(params, optimizer.init(params)), []
    for i in range(60):
        points = 0.5 * jax.random.normal(jax.random.fold_in(key, i), (64, 2)) + jax.numpy.array([1.0, -1.0])
        batch, _ = draw_batch(points, None, jax.random.fold_in(key, 1000 + i), P_mean=-0.5, P_std=1.0)
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        averages = state.opt_state[-1]
        if i == 0:
            assert np.array_equal(averages.averages["0.05"]["in"], state.params["in"])
    assert int(averages.time) == 60 * 64
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert not np.array_equal(averages.averages["0.05"]["in"], state.params["in"])


def test_parameters_are_prepared_once_a_step_where_a_batch_is_divided():
    """A backbone whose weights are doubled, unless they are already: the same step, in parts or whole."""
    calls = []

    def doubled(params):
        calls.append(1)
        return {**{name: 2 * w for name, w in params.items()}, "doubled": jax.numpy.ones(())}

    def backbone(params, *inputs, key):
        scale = 1 if "doubled" in params else 2
        return own_backbone({name: scale * w for name, w in params.items()}, *inputs, key=key)

    def first(**options):
        step = jax.jit(make_step(denoiser(backbone), optimizer, prepare=doubled, **options))
        state, metrics = step(TrainState(params, optimizer.init(params)), batch)
        return state.params, metrics.loss

    params, optimizer, points = own_params(), optax.sgd(0.1), jax.random.normal(jax.random.key(1), (12, 2))
    batch, _ = draw_batch(points, None, jax.random.key(2), P_mean=-0.5, P_std=1.0)
    whole = first()
    assert not calls
    parts = first(microbatch=4)
    assert len(calls) == 1
    for got, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert tolerance.relative(got, wanted) < 1e-5


def test_any_denoiser_is_sampled_from_with_levels_and_a_callback_of_ones_own():
    """A point mass at m: D is m, so one Euler step from any level to 0 is m. Guidance goes past it."""
    middle = jax.numpy.array([1.0, 2.0])

    def to_point(params, x, sigma, labels=None, *, key=None):
        shift = 0 if labels is None else labels @ params
        return middle + shift + 0 * x, jax.numpy.zeros_like(sigma)

    point, seen = Network(to_point, jax.numpy.eye(2), label_dim=2, label_dropout=0.1), []
    noise, labels = jax.random.normal(jax.random.key(0), (3, 2)), jax.numpy.eye(2)[jax.numpy.array([0, 1, 0])]
    images = api.sample(point, noise, sigmas=(5.0, 1.0, 0.0), callback=lambda step: seen.append(step.sigma))
    assert np.allclose(images, np.broadcast_to(middle, (3, 2)), atol=1e-6)
    assert seen == [1.0, 0.0]
    guided = api.sample(point, noise, labels, guidance=3.0, num_steps=4)
    assert np.allclose(guided, middle + 3 * labels, atol=1e-5)
    always = replace(point, label_dropout=0.0)
    with pytest.raises(InputError, match="that guides itself must be trained with label dropout, got label_dropout 0"):
        api.sample(always, noise, labels, guidance=3.0)
    with pytest.raises(InputError, match="label_dropout 0 must be sampled with labels, got None"):
        api.sample(always, noise)


def test_the_python_face_loads_what_a_run_stored_and_samples_as_the_port(toy):
    """The command folds the weights once, and the network guides itself in one call: rounding differs."""
    train(JaxTrainer, "run", 1024, label_dropout=0.1)
    net = api.load(toy / "run", sigma_rel=0.05, device="cpu")
    assert net.config == replace(PRESET.network, label_dropout=net.label_dropout)
    assert net.label_dropout == 0.1
    labels = np.eye(10, dtype=np.float32)[:4]
    noise = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    stored = weights.dump(net.params)
    cpu = jax.devices("cpu")[0]
    wanted = replace(PORT, device=cpu).sample(net.config, stored, noise, labels, guidance=2.0, num_steps=3)
    got = api.sample(net, jax.device_put(weights.to_nhwc(noise), cpu), labels, guidance=2.0, num_steps=3)
    allowed = tolerance.sampled(net.config, evaluations=5, gain=1.0, guidance=2.0)
    assert tolerance.relative(weights.to_nchw(got), wanted) < allowed
    x, sigma = weights.to_nhwc(noise), np.ones((4, 1, 1, 1), np.float32)
    for got, wanted in zip(jax.jit(net.apply)(net.params, x, sigma, labels), net(x, sigma, labels), strict=True):
        assert tolerance.relative(got, wanted) < tolerance.network(net.config)
    assert jax.tree.leaves(jax.tree.map(lambda x: 2 * x, net))[0].dtype == np.float32  # a pytree


def test_importing_the_port_imports_no_jax():
    code = "import sys, backends.jax; assert 'jax' not in sys.modules; backends.jax.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
