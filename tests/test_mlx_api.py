"""The Python face of the MLX port: new and stored networks, any backbone, sampling and training in a few calls."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from toy_port import CONFIG

import backends.mlx
from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.config import TrainConfig
from conformance import strategies as draw
from conformance import tolerance
from edm2_core import precond, sampler
from edm2_core.ema import Length, tracking
from edm2_core.errors import InputError
from edm2_core.network import initialize, plan
from edm2_core.presets import Hyperparameters

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from mlx import nn  # noqa: E402

from backends.mlx import step, weights  # noqa: E402
from backends.mlx.api import Denoiser, Network, sample, train  # noqa: E402
from backends.mlx.network import kept  # noqa: E402
from backends.mlx.port import PORT  # noqa: E402
from examples import own_backbone_mlx  # noqa: E402


@pytest.mark.parametrize("rung", "ABG")
def test_a_new_network_has_the_initial_distributions_of_the_core(rung):
    config = replace(CONFIG, model_channels=40, logvar_channels=300, channels_per_head=40, ladder=rung)
    mx.random.seed(0)
    ours, core = weights.dump(weights.tensors(Network(config))), initialize(config, seed=0)
    assert ours.keys() == core.keys()
    for name, parameter in plan(config).parameters.items():
        a, b = ours[name], core[name]
        assert a.shape == b.shape
        if parameter.init in ("zeros", "ones", "positions", "quadratures"):
            assert np.allclose(a, b, rtol=1e-6, atol=0), name
            continue
        he, turn = np.sqrt(2 / parameter.fan_in), 2 * np.pi
        means = {"normal": (0, 1), "he": (0, he), "frequencies": (0, turn), "phases": (np.pi, turn / np.sqrt(12))}
        mean, deviation = means[parameter.init]
        assert abs(a.mean() - mean) < 6 * deviation / np.sqrt(a.size), name
        assert a.size < 50 or abs(a.std() / deviation - 1) < 6 / np.sqrt(2 * a.size), name


def test_a_new_network_is_drawn_from_the_global_key():
    drawn = []
    for seed in (0, 0, 1):
        mx.random.seed(seed)
        drawn.append(weights.dump(weights.tensors(Network(CONFIG)))["unet.out_conv.weight"])
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


# ---- any backbone


class Backbone(nn.Module):
    """Of vectors [N, 3], with its own dropout."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 3)

    def __call__(self, x, c_noise, labels, *, dropout=None):
        extra = mx.zeros((len(x), 1)) if labels is None else labels[:, :1]
        h = nn.silu(self.enter(mx.concatenate([x, c_noise[:, None], extra], axis=1)))
        return self.leave(h if dropout is None else h * kept(dropout, h, 0.5))


def vectors(count=6):
    x, noise = (mx.random.normal((count, 3), key=mx.random.key(k)) for k in (0, 1))
    sigma = mx.exp(mx.random.normal((count, 1), key=mx.random.key(2)))
    return step.Batch(x, noise, sigma, mx.eye(2)[mx.arange(count) % 2])


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_a_denoiser_is_the_preconditioned_backbone(sigma_data):
    backbone, batch = Backbone(), vectors()
    denoiser = Denoiser(backbone, sigma_data=sigma_data, uncertainty=lambda c_noise: c_noise[:, None], label_dim=2)
    denoised, logvar = denoiser(batch.images, batch.sigma, batch.labels)
    x, sigma = draw.wide((np.array(batch.images), np.array(batch.sigma)))

    def float32(x, c_noise):
        return draw.wide(np.array(backbone(*(mx.array(a.astype(np.float32)) for a in (x, c_noise)), batch.labels)))

    wanted = precond.denoise(float32, x, sigma, sigma_data=sigma_data)
    assert tolerance.relative(np.array(denoised), wanted) < 1e-6
    assert np.array(logvar) == pytest.approx(np.log(sigma) / 4, rel=1e-6)
    assert not np.array(Denoiser(backbone)(batch.images, batch.sigma)[1]).any()


def test_the_step_trains_and_averages_any_backbone():
    """The averages are those of the core over the weights after each step; only a dropout key drops."""
    mx.random.seed(0)
    denoiser, batch = Denoiser(Backbone(), label_dim=2), vectors()
    learner, losses = step.Learner(denoiser, sigma_rels=(0.1, Length.half_life(20))), []
    averages = tracking.start(weights.dump(weights.tensors(denoiser)), sigma_rels=tuple(learner.ema.averages))
    for number in range(1, 31):
        losses.append(float(learner.step(batch, lr=0.02)[0]))
        now = weights.dump(weights.tensors(denoiser))
        averages = tracking.advance(averages, now, t_next=6 * number, t_delta=6)
    assert learner.nimg == 180
    assert losses[-1] < 0.7 * losses[0]
    for length, arrays in averages.items():
        assert tolerance.relative_all(weights.dump(learner.ema.arrays(length)), arrays, 1e-3)[0] < 1e-5
    resumed = step.Learner(Denoiser(Backbone(), label_dim=2), sigma_rels=(0.1, Length.half_life(20)))
    resumed.load_state(learner.state())
    keys = [None, mx.random.split(mx.random.key(1), len(batch.images))]
    one, other = (float(learner.step(batch, lr=0.02, dropout=key)[0]) for key in keys)
    assert one == float(resumed.step(batch, lr=0.02)[0])
    assert abs(other - one) > 0.01


def test_sampling_takes_any_denoiser_with_guidance_sigmas_and_a_callback():
    """Of a backbone that is the label: D = c_skip x + c_out label, in NumPy too."""

    def backbone(x, c_noise, labels):
        return mx.zeros_like(x) if labels is None else labels

    denoiser, always = (Denoiser(backbone, label_dim=2, label_dropout=share) for share in (0.1, 0.0))
    labels, noise, sigmas, seen = np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32), (5.0, 1.0, 0.2, 0.0), []

    def oracle(x, sigma):
        return precond.denoise(lambda x, _: 3 * labels, x, np.full((2, 1), sigma))  # 0 + guidance * (label - 0)

    def callback(at):
        seen.append(at.sigma)
        return 2 * at.x if at.index == 0 else None

    native = {"guidance": 3.0, "sigmas": sigmas, "callback": callback}
    got = sample(denoiser, mx.array(noise), mx.array(labels), **native)
    assert isinstance(got, mx.array)
    wanted = sampler.sample(oracle, noise, sigmas=sigmas, callback=callback)
    assert tolerance.relative(np.array(got), wanted) < 1e-5
    assert seen == [1.0, 0.2, 0.0] * 2
    with pytest.raises(InputError, match="guidance without a guide"):
        sample(denoiser, mx.array(noise), guidance=2.0)
    with pytest.raises(InputError, match="that guides itself must be trained with label dropout, got label_dropout 0"):
        sample(always, mx.array(noise), mx.array(labels), guidance=2.0)
    with pytest.raises(InputError, match="label_dropout 0 must be sampled with labels, got None"):
        sample(always, mx.array(noise))


def test_a_stored_network_is_loaded_ready_to_use(tmp_path):
    params, batch = draw.random_parameters(CONFIG, 1), draw.random_batch(CONFIG, 3)
    params = {name: np.float32(np.float16(array)) for name, array in params.items()}  # as snapshots store them
    path = tmp_path / snapshot_name(5000, Length.of(0.1))
    save_snapshot(path, Snapshot(params=params, config=CONFIG, nimg=5000, length=Length.of(0.1)))
    network = backends.mlx.load(path, device="cpu")
    assert network.config == CONFIG
    denoised, _ = network(*(weights.to_native(a) for a in (batch.images, batch.sigma, batch.labels)))
    wanted, _ = PORT.denoise(CONFIG, params, batch.images, batch.sigma, batch.labels)
    assert tolerance.relative(weights.to_canonical(denoised), wanted) < 1e-3  # gains are stored in float32


def test_training_in_python_makes_a_run_that_loads(tmp_path):
    hyper = Hyperparameters(duration=96, batch=32, half_life=1000)  # with few other lengths to draw at the end
    config = TrainConfig(network=replace(CONFIG, label_dropout=0.2), hyper=hyper)
    run = train(config, open_dataset("digits"), outdir=tmp_path / "run")
    network = backends.mlx.load(run.path)
    assert network.config == config.network
    made = sample(network, mx.random.normal((2, 8, 8, 1)), mx.eye(10)[:2], num_steps=2)
    assert made.shape == (2, 8, 8, 1)
    assert bool(mx.isfinite(made).all())


def test_importing_the_package_imports_no_mlx():
    script = "import sys, backends.mlx; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_example_learns_two_moons(capsys):
    own_backbone_mlx.main(images=120_000, samples=128)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [name for name, *_ in rows] == ["raw", "averaged"]
    assert all(float(distance) < 0.12 for _, distance, _ in rows)


def test_a_step_that_fails_while_it_changes_the_state_is_marked(monkeypatch):
    learner = step.Learner(weights.build(CONFIG, initialize(CONFIG, seed=0)))
    arrays = draw.random_batch(CONFIG, 3, size=2)
    batch = step.Batch(*(None if array is None else weights.to_native(array) for array in arrays))
    learner.step(batch, lr=0.01)
    assert not learner.updating

    def fails(**clock):
        raise RuntimeError("[metal::malloc] cannot allocate")

    monkeypatch.setattr(learner.ema, "update", fails)
    with pytest.raises(RuntimeError):
        learner.step(batch, lr=0.01)
    assert learner.updating
