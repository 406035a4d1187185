"""Post-hoc EMA of a Flax NNX model: a plain function advances the averages after each step, inside jit."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from backends.jax import ema
from backends.pipeline.data.datasets import open_dataset

BATCH, SAVE_EVERY, TRAINING = 16, 1000, 800  # images per step, between snapshots, and to train on


def weights(model: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def loss(model: Any, x: Any, y: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model: Any, optimizer: Any, averages: Any, seen: Any, x: Any, y: Any) -> Any:
    optimizer.update(model, nnx.grad(loss)(model, x, y))
    return ema.update(averages, weights(model), time=seen, delta=BATCH)


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    data, rng, order = open_dataset("digits"), np.random.default_rng(0), np.random.default_rng(0).permutation(1797)
    x, y = data.format.codec.encode(data.read(order)).reshape(1797, 64), data.labels(order).astype(np.int32)
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 10, rngs=nnx.Rngs(1)))
    optimizer, averages = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param), ema.init(weights(model))
    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        for seen in range(BATCH, images + 1, BATCH):
            picks, noise = rng.integers(TRAINING, size=BATCH), rng.standard_normal((BATCH, 64), np.float32)
            averages = step(model, optimizer, averages, seen, x[picks] + 0.5 * noise, y[picks])
            if seen % SAVE_EVERY == 0:
                ema.save(folder, averages)

        def held_out_loss(average: Any) -> float:
            nnx.update(model, average)
            return float(loss(model, x[TRAINING:], y[TRAINING:]))

        raw = held_out_loss(weights(model))
        best = ema.best_length(folder, like=weights(model), metric=held_out_loss)
    print(f"length  held-out loss\nraw     {raw:10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
