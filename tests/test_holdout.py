"""The loss on held-out data: what it is, where it is logged, and when it warns."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from toy_port import CONFIG, ToySampler, ToyTrainer, config_of, run_toy

from backends.pipeline.data.batches import prepared, stored_batch
from backends.pipeline.data.datasets import held_out, open_dataset
from backends.pipeline.data.seeds import noise
from backends.pipeline.runs.holdout import HeldOut, Overfitting
from backends.pipeline.runs.team import Team
from backends.ports import Machine
from edm2_core import loss, reference

pytestmark = pytest.mark.usefixtures("toy")
DIGITS = open_dataset("digits")


@pytest.mark.parametrize("port", ["torch", "jax", "mlx"])
def test_a_trainer_evaluates_its_own_weights_without_dropout(port):
    """Oracle: the reference in float64."""
    pytest.importorskip({"mlx": "mlx.core"}.get(port, port))
    config = config_of(preset="toy", data="digits", batch=16, dropout=0.5, batch_per_device=8)
    names = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
    machine = Machine(device="cpu", batch_per_device=8)
    trainer = getattr(import_module(f"backends.{port}.trainer"), names[port])(config, machine)
    stored = stored_batch(DIGITS, np.arange(16))
    for _ in range(2):
        trainer.step(trainer.place(stored), lr=0.05)
    unit, sigma = noise(range(16), (1, 8, 8)), np.geomspace(0.05, 5, 16).astype(np.float32)
    got = trainer.evaluate(trainer.place(stored), unit, sigma)
    images, labels, _ = prepared(stored, DIGITS.format, label_dim=10)
    params = {name: array.astype(np.float64) for name, array in trainer.parameters().items()}
    level = sigma.astype(np.float64).reshape(-1, 1, 1, 1)
    denoised, _ = reference.denoise(CONFIG, params, images + unit * level, level, labels.astype(np.float64))
    wanted = (loss.weight(level) * (denoised - images) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(got, wanted, rtol=1e-3)
    assert trainer.nimg == 32


def test_every_level_has_its_share_and_processes_share_the_images():
    config = config_of(preset="toy", data="digits", batch=64, holdout=0.1)
    _, held = held_out(DIGITS, 0.1, seed=0)
    whole = HeldOut(config, held, ToyTrainer(config))
    shares = [HeldOut(config, held, ToyTrainer(config, team=Team(rank, 2))) for rank in range(2)]
    for part, (batch, unit, sigma, _) in enumerate(whole._parts):
        for i, of_whole in enumerate((batch.images, unit, sigma)):
            halves = [share._parts[part][i] for share in shares]
            halves = [half.images if i == 0 else half for half in halves]
            np.testing.assert_array_equal(np.concatenate(halves), of_whole)
    assert len(whole._parts) == 2  # of 180 images in batches of 64
    measured = whole.measure()
    assert measured["holdout"] == pytest.approx(np.mean(measured["holdout_by_sigma"]))
    assert list(measured["holdout_sigma"]) == sorted(measured["holdout_sigma"])


def test_it_is_logged_and_held_out_images_are_never_trained_on():
    trainers = []

    class Kept(ToyTrainer):
        def take_step(self, batch, *, lr):
            trainers.append(batch.images)
            return super().take_step(batch, lr=lr)

    options = {"preset": "toy", "data": "digits", "outdir": "run", "duration": 4096, "holdout": 0.5}
    assert run_toy(Kept, ToySampler(), **options) == 0
    _, held = held_out(DIGITS, 0.5, seed=0)
    forbidden = {image.tobytes() for image in held.read(np.arange(len(held)))}
    kept, _ = held_out(DIGITS, 0.5, seed=0)
    allowed = {image.tobytes() for image in kept.read(np.arange(len(kept)))}
    assert not {image.tobytes() for images in trainers for image in images} & (forbidden - allowed)
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(len(record["holdout_by_sigma"]) == 5 for record in records)


def test_a_loss_that_turns_up_is_said_once():
    said = []
    warn = Overfitting(said.append)
    for nimg, value in enumerate([1.0, 0.5, 0.4, 0.41, 0.3, 0.31, 0.3, 0.32, 0.33, 0.34, float("nan"), 0.5]):
        warn(value, nimg)
    assert len(said) == 1
    assert "risen from 0.3000 at 4 images to 0.3400 at 9" in said[0]
