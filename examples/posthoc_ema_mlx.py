"""Post-hoc EMA in your own MLX loop: train once, then choose the averaging length.

A small network classifies noisy digits. Its learning rate is constant and so high that its weights keep fluctuating,
which averaging removes. Snapshots of two averages give any other length after training.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import tyro
from mlx import nn, optimizers
from mlx.utils import tree_flatten

from backends.mlx.ema import PowerEMA, reconstruct
from backends.pipeline.data.datasets import open_dataset

BATCH, SAVE_EVERY, TRAINING = 16, 2000, 800  # images per step, between snapshots, and to train on
LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.17, 0.22, 0.28)  # sigma_rel


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (empty; by default a temporary one); then compare lengths."""
    mx.random.seed(0)
    data, rng = open_dataset("digits"), np.random.default_rng(0)
    order = rng.permutation(1797)
    x, y = data.format.codec.encode(data.read(order)).reshape(1797, 64), data.labels(order)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, gradient = optimizers.Adam(learning_rate=0.01), nn.value_and_grad(model, loss)
    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        ema = PowerEMA(model)  # two averages, of length 0.05 and 0.10
        for seen in range(BATCH, images + 1, BATCH):
            picks = rng.integers(TRAINING, size=BATCH)
            noisy = x[picks] + 0.5 * rng.standard_normal((BATCH, 64), np.float32)
            _, gradients = gradient(model, mx.array(noisy), mx.array(y[picks]))
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
            ema.update(time=seen, delta=BATCH)
            if seen % SAVE_EVERY == 0:
                ema.save(folder)
        raw = dict(tree_flatten(model.parameters()))
        choices = {"raw": raw} | {f"{s:.2f}": reconstruct(folder, sigma_rel=s) for s in LENGTHS}
    print("length  held-out loss  accuracy")
    for name, weights in choices.items():
        model.load_weights(list(weights.items()))
        held_out, labels = mx.array(x[TRAINING:]), mx.array(y[TRAINING:])
        correct = model(held_out).argmax(1) == labels
        print(f"{name:6}  {loss(model, held_out, labels).item():13.4f}  {correct.mean().item():8.1%}")


if __name__ == "__main__":
    tyro.cli(main)
