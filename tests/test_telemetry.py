"""Magnitudes of a step: what they are, that measuring changes nothing, and the story that they tell (Appendix A.6)."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from backends.pipeline import telemetry
from backends.pipeline.datasets import open_dataset
from backends.pipeline.options import TrainOptions
from backends.pipeline.runs import Run
from backends.pipeline.settings import resolve
from backends.pipeline.telemetry import BINS, Measurement
from conformance import tolerance
from edm2_core import reference
from edm2_core.loss import weight as loss_weight
from edm2_core.network import initialize, plan
from edm2_core.precond import precondition

TRAINERS = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
each_port = pytest.mark.parametrize("port", TRAINERS)


def settings_of(rung, **options):
    chosen = TrainOptions(ladder=rung, batch=16, rampup=0, telemetry=1, **options)
    settings = resolve(chosen, open_dataset("digits"))
    # smaller than the preset: two levels, one of them attending
    small = replace(settings.network, model_channels=8, channels_per_head=8, attn_resolutions=(4,), channel_mult=(1, 2))
    return replace(settings, network=small), chosen


def trainer_of(port, rung, **options):
    pytest.importorskip(port, reason=f"{port} is not installed")
    settings, chosen = settings_of(rung, **options)
    return settings, getattr(import_module(f"backends.{port}.trainer"), TRAINERS[port])(settings, chosen)


def batch():
    data, some = open_dataset("digits"), np.arange(16)
    images = data.images(some).astype(np.float32) / 127.5 - 1
    return images, np.eye(10, dtype=np.float32)[data.labels(some)]


@each_port
@pytest.mark.parametrize("rung", ["A", "C", "G"])
def test_a_measured_step_is_the_step(port, rung):
    """Dropout included, where the rung has it: measuring draws nothing from what training draws from."""
    (_, one), (_, other) = trainer_of(port, rung), trainer_of(port, rung)
    for step in range(2):
        one.step(*batch(), nimg=16 * step, lr=0.01)
        other.measured_step(*batch(), nimg=16 * step, lr=0.01)
    plain, measured = one.state(), other.state()
    for part, arrays in plain.parts().items():
        for name, array in arrays.items():
            assert np.array_equal(array, measured.parts()[part][name]), (part, name)
    assert one.metrics() == other.metrics()


@each_port
@pytest.mark.parametrize("rung", ["B", "D", "G"])
def test_magnitudes_are_those_of_the_step(port, rung):
    """Of weights as the step begins, gradients by Adam's first moment, updates by what moved; of the first convolution
    and of noise levels as the reference sees them."""
    settings, trainer = trainer_of(port, rung)
    config, (images, labels) = settings.network, batch()
    before = initialize(config, seed=settings.seed)
    found = trainer.measured_step(images, labels, nimg=0, lr=0.01)
    after = trainer.state()
    names = [name for weights in telemetry.watched(config).values() for name in weights]
    assert (
        found.weights.keys() == found.gradients.keys() == found.updates.keys() == found.activations.keys() == {*names}
    )
    for name in names:
        rows = before[name].reshape(len(before[name]), -1).astype(np.float64)
        start = rows / (1e-4 + np.sqrt(np.mean(rows**2, axis=1, keepdims=True))) if rung == "G" else rows
        assert found.weights[name] == pytest.approx(summary(start), rel=1e-4)
        gradient = after.moments1[name] / (1 - settings.betas[0])
        assert found.gradients[name] == pytest.approx(summary(gradient.reshape(len(rows), -1)), rel=1e-3, abs=1e-9)
        moved = after.params[name].reshape(rows.shape) - start
        size = np.linalg.norm(start)
        rounding = 4 * tolerance.eps("float32") * size
        assert found.updates[name] == pytest.approx([np.linalg.norm(moved), size], rel=1e-3, abs=rounding)
    assert found.sigma.shape == found.loss.shape == found.u.shape == (16,)
    c_noise = precondition(found.sigma.astype(np.float64)).c_noise
    u = reference.uncertainty(config, before, c_noise).ravel()
    assert found.u == pytest.approx(u, rel=1e-4, abs=1e-5)
    # a fresh network of these rungs puts out nothing (B, G) or something (D)
    if rung != "D":
        nothing = loss_weight(found.sigma) * np.square(precondition(found.sigma).c_skip - 1)
        assert found.loss.min() > 0.05 * nothing.min()
    first = f"{plan(config).encoder[0].name}.weight"
    assert first not in names or 0 < found.activations[first][1] <= found.activations[first][0]
    gain = [name for name in names if name.endswith("emb_linear.weight")]
    assert all(found.activations[name] == pytest.approx([0, 0], abs=1e-9) for name in gain) == (rung == "G")


def summary(rows):
    magnitudes = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1))
    return [magnitudes.max(), magnitudes.mean()]


def test_a_line_holds_blocks_and_noise_levels():
    settings, _ = settings_of("G")
    names = telemetry.watched(settings.network)
    flat = [name for weights in names.values() for name in weights]
    rows = {name: np.array([2.0 + i, 1.0]) for i, name in enumerate(flat)}
    edge = np.exp(settings.P_mean + 3 * settings.P_std)
    measured = Measurement(
        activations=rows, weights=rows, gradients=rows, updates={name: np.array([3.0, 4.0]) for name in flat},
        sigma=np.array([1e-9, np.exp(settings.P_mean), 2 * edge, 3 * edge]), loss=np.array([1.0, 2.0, 3.0, 5.0]),
        u=np.array([0.1, 0.2, 0.3, 0.5]),
    )  # fmt: skip
    line = telemetry.record(settings, measured, nimg=64)
    assert line["nimg"] == 64
    block = line["blocks"]["unet.enc.8x8_block0"]
    own = [rows[name][0] for name in names["unet.enc.8x8_block0"]]
    assert (block["role"], block["resolution"]) == ("enc", 8)
    assert (block["weight_max"], block["activation_mean"], block["update"]) == (max(own), 1.0, 0.75)
    noise = line["noise"]
    assert [len(noise[key]) for key in ("sigma", "loss", "u", "count")] == [BINS] * 4
    assert (noise["count"][0], noise["count"][BINS // 2], noise["count"][-1], sum(noise["count"])) == (1, 1, 2, 4)
    assert (noise["loss"][0], noise["loss"][-1], noise["u"][-1], noise["loss"][1]) == (1.0, 4.0, 0.4, None)
    assert telemetry.record(settings, replace(measured, u=None), nimg=0)["noise"]["u"] == [None] * BINS


def ladder_run(tmp_path, rung):
    """A short run on digits, whose lines are (largest activation, mean weight magnitude) over blocks."""
    train = import_module("backends.torch.train").main
    options = ("--ladder", rung, "--duration", "12Ki", "--telemetry", "16", "--snapshot", "64Ki", "--sigma-rels", "0.1")
    assert train([*options, "--outdir", str(tmp_path / rung)]) == 0
    lines = [line["blocks"].values() for line in Run(tmp_path / rung).telemetry()]
    pairs = [
        [max(b["activation_max"] for b in blocks), np.mean([b["weight_mean"] for b in blocks])] for blocks in lines
    ]
    return np.array(pairs).T


def test_weights_grow_in_config_d_and_stay_in_config_e(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    (_, grown), (_, forced) = ladder_run(tmp_path, "D"), ladder_run(tmp_path, "E")
    assert np.all(np.diff(grown) > 0)
    assert grown[-1] > 1.02 * grown[0]
    assert np.abs(forced - 1).max() < 2e-4  # forced to 1 - 1e-4
