"""Telemetry of a step: its values, that measuring changes nothing, and the growth of activations (Appendix A.6)."""

from dataclasses import replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
from toy_port import config_of

from backends.pipeline.data.batches import stored_batch
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import telemetry
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.telemetry import BINS
from backends.ports import Machine
from backends.trainer import Measurement
from conformance import tolerance
from edm2_core import reference
from edm2_core.network import initialize, plan
from edm2_core.precond import precondition

TRAINERS = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}


def small_config(rung):
    config = config_of(ladder=rung, batch=16, rampup=0, telemetry=1)
    small = replace(config.network, img_resolution=8, model_channels=8, channels_per_head=8, channel_mult=(1,))
    return replace(config, network=small)


def trainer_of(port, config):
    pytest.importorskip(port, reason=f"{port} is not installed")
    return getattr(import_module(f"backends.{port}.trainer"), TRAINERS[port])(config, Machine(device="cpu"))


def batch():
    return stored_batch(open_dataset("digits"), np.arange(16))


@pytest.mark.parametrize(("port", "rung"), [*(("torch", rung) for rung in "ABDG"), *product(("jax", "mlx"), "BG")])
def test_a_measured_step_is_the_step_and_says_what_it_was(port, rung):
    """The state is that of steps without telemetry, dropout included; magnitudes are those of weights as the step
    begins, of gradients as Adam's first moment has them, of updates by the difference; u is the reference's."""
    config = small_config(rung)
    plain, trainer = trainer_of(port, config), trainer_of(port, config)
    network, first = config.network, initialize(config.network, seed=config.seed)
    measured = trainer.measured_step(trainer.place(batch()), lr=0.01)
    plain.step(plain.place(batch()), lr=0.01)
    check_same(trainer.state(), plain.state())
    check_magnitudes(config, measured, first, trainer.state())
    u = reference.uncertainty(network, first, precondition(measured.sigma.astype(np.float64)).c_noise).ravel()
    assert (measured.u is None) == (rung == "A")
    assert measured.u is None or measured.u == pytest.approx(u, rel=1e-4, abs=1e-5)
    assert measured.sigma.shape == measured.loss.shape == (16,)
    for one in (trainer, plain):
        one.step(one.place(batch()), lr=0.01)
    check_same(trainer.state(), plain.state())
    assert trainer.metrics() == plain.metrics()


@pytest.mark.parametrize("port", TRAINERS)
def test_gradients_are_those_of_the_step_and_not_of_the_steps_before(port):
    """Adam's first moment after two steps is 0.9 times that after one, and 0.1 times the second step's gradient."""
    trainer = trainer_of(port, config := small_config("B"))
    trainer.step(trainer.place(batch()), lr=0.01)
    before = trainer.state().moments1
    measured, after = trainer.measured_step(trainer.place(batch()), lr=0.01), trainer.state().moments1
    beta = config.hyper.betas[0]
    for name, magnitudes in measured.gradients.items():
        gradient = (after[name].astype(np.float64) - beta * before[name]) / (1 - beta)
        assert magnitudes == pytest.approx(summary(gradient.reshape(len(gradient), -1)), rel=1e-3, abs=1e-6)


def check_same(one, other):
    assert (one.nimg, one.steps) == (other.nimg, other.steps)
    pairs = [(one.params, other.params), (one.moments1, other.moments1), (one.moments2, other.moments2)]
    for mine, theirs in [*pairs, *((one.averages[length], other.averages[length]) for length in one.averages)]:
        for name, array in mine.items():
            assert np.array_equal(array, theirs[name]), name


def check_magnitudes(config, measured, before, after):
    table = plan(config.network).parameters
    names = {name for weights in telemetry.watched(config.network).values() for name in weights}
    parts = (measured.weights, measured.gradients, measured.updates, measured.activations)
    assert all(part.keys() == names for part in parts)
    for name in names:
        rows = before[name].reshape(len(before[name]), -1).astype(np.float64)
        forced = table[name].normalized
        start = rows / (1e-4 + np.sqrt(np.mean(rows**2, axis=1, keepdims=True))) if forced else rows
        assert measured.weights[name] == pytest.approx(summary(start), rel=1e-4)
        gradient = after.moments1[name] / (1 - config.hyper.betas[0])
        assert measured.gradients[name] == pytest.approx(summary(gradient.reshape(len(rows), -1)), rel=1e-3, abs=1e-9)
        moved, size = after.params[name].reshape(rows.shape) - start, np.linalg.norm(start)
        rounding = 4 * tolerance.eps("float32") * size
        assert measured.updates[name] == pytest.approx([np.linalg.norm(moved), size], rel=1e-3, abs=rounding)
        assert 0 <= measured.activations[name][1] <= measured.activations[name][0] < 100
        gained = name.endswith("emb_linear.weight") and config.network.switches.gains
        assert (measured.activations[name][0] == 0) == (gained or not before[name].any())  # gains are 0 at first


def summary(rows):
    magnitudes = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1))
    return [magnitudes.max(), magnitudes.mean()]


def test_a_line_holds_blocks_and_noise_levels():
    config = small_config("G")
    names = telemetry.watched(config.network)
    flat = [name for weights in names.values() for name in weights]
    rows = {name: np.array([2.0 + i, 1.0]) for i, name in enumerate(flat)}
    edge = np.exp(config.hyper.P_mean + 3 * config.hyper.P_std)
    measured = Measurement(
        activations=rows, weights=rows, gradients=rows, updates={name: np.array([3.0, 4.0]) for name in flat},
        sigma=np.array([1e-9, np.exp(config.hyper.P_mean + 0.01), 2 * edge, 3 * edge]),
        loss=np.array([1.0, 2.0, 3.0, 5.0]),
        u=np.array([0.1, 0.2, 0.3, 0.5]),
    )  # fmt: skip
    line = telemetry.record(config, measured, nimg=64)
    assert line["nimg"] == 64
    block = line["blocks"]["unet.enc.8x8_block0"]
    own = [rows[name][0] for name in names["unet.enc.8x8_block0"]]
    assert (block["role"], block["size"]) == ("enc", (8, 8))
    assert (block["weight_max"], block["activation_mean"]) == (max(own), 1.0)
    assert block["update"] == pytest.approx(0.75)
    noise = line["noise"]
    assert [len(noise[key]) for key in ("sigma", "loss", "u", "count")] == [BINS] * 4
    assert (noise["count"][0], noise["count"][BINS // 2], noise["count"][-1], sum(noise["count"])) == (1, 1, 2, 4)
    assert (noise["loss"][0], noise["loss"][-1], noise["u"][-1], noise["loss"][1]) == (1.0, 4.0, 0.4, None)
    assert telemetry.record(config, replace(measured, u=None), nimg=0)["noise"]["u"] == [None] * BINS


def ladder_run(tmp_path, rung):
    """A short run on digits, at one learning rate on all rungs: the largest activation and the mean magnitude of
    weights, over blocks, each time that they were measured."""
    train = import_module("backends.torch.train").main
    options = (
        "--ladder",
        rung,
        "--channels",
        "16",
        "--channels-per-head",
        "16",
        "--lr",
        "0.05",
        "--duration",
        "8Ki",
        "--telemetry",
        "16",
        "--snapshot",
        "64Ki",
    )
    assert train([*options, "--sigma-rels", "0.1", "--no-picture", "--outdir", str(tmp_path / rung)]) == 0
    lines = [line["blocks"].values() for line in Run(tmp_path / rung).telemetry()]
    pairs = [
        [max(b["activation_max"] for b in blocks), np.mean([b["weight_mean"] for b in blocks])] for blocks in lines
    ]
    return np.array(pairs).T


def test_activations_grow_up_to_config_c_and_weights_up_to_config_d(tmp_path):
    """Figures 3 and 15, in small: C's largest activation grows by two orders of magnitude, those of D and E stay below
    where C's begins; D's weights grow at every measurement, E's are forced to 1 - 1e-4."""
    pytest.importorskip("torch", reason="torch is not installed")
    (c, _), (d, grown), (e, forced) = (ladder_run(tmp_path, rung) for rung in "CDE")
    assert np.all(np.diff(c) > 0)
    assert c[-1] > 50 * c[0]
    assert max(d.max(), e.max()) < c[0]
    assert np.all(np.diff(grown) > 0)
    assert grown[-1] > 1.02 * grown[0]
    assert np.abs(forced - 1).max() < 2e-4
