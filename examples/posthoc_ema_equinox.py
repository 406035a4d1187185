"""Post-hoc EMA of an Equinox model: train once, then choose the averaging length.

The averages are an optax transformation, the last in the chain, of the model's arrays; functions and sizes are no part.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import tyro

from backends.jax.ema import best_length, power_ema, save
from backends.pipeline.data.datasets import open_dataset

BATCH, SAVE_EVERY, TRAINING = 16, 1000, 800  # images per step, between snapshots, and to train on


def loss(model: Any, x: Any, y: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (empty; by default a temporary one); then choose a length."""
    data, rng, order = open_dataset("digits"), np.random.default_rng(0), np.random.default_rng(0).permutation(1797)
    x, y = data.format.codec.encode(data.read(order)).reshape(1797, 64), data.labels(order).astype(np.int32)
    model = eqx.nn.MLP(in_size=64, out_size=10, width_size=64, depth=2, key=jax.random.key(0))
    optimizer = optax.chain(optax.adam(0.01), power_ema(t_delta=BATCH))  # averages of lengths 0.05 and 0.10
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Any, state: Any, x: Any, y: Any) -> Any:
        gradients = eqx.filter_grad(loss)(model, x, y)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state

    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        for seen in range(BATCH, images + 1, BATCH):
            picks, noise = rng.integers(TRAINING, size=BATCH), rng.standard_normal((BATCH, 64), np.float32)
            model, state = step(model, state, x[picks] + 0.5 * noise, y[picks])
            if seen % SAVE_EVERY == 0:
                save(folder, state[-1])
        weights, rest = eqx.partition(model, eqx.is_array)

        def held_out_loss(average: Any) -> jax.Array:
            return loss(eqx.combine(average, rest), x[TRAINING:], y[TRAINING:])

        best = best_length(folder, like=weights, metric=held_out_loss)
    print(f"length  held-out loss\nraw     {float(held_out_loss(weights)):10.6g}\n{best}")


if __name__ == "__main__":
    tyro.cli(main)
