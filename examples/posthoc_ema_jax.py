"""Post-hoc EMA in your own JAX loop: train once, then choose the averaging length.

The averages are an optax transformation, the last in the chain, inside the jitted step with donated state.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from backends.jax.ema import power_ema, reconstruct, save
from backends.pipeline.data.datasets import open_dataset

BATCH, SAVE_EVERY, TRAINING = 16, 2000, 800  # images per step, between snapshots, and to train on
LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.17, 0.22, 0.28)  # sigma_rel


def loss(params: Any, x: Any, y: Any) -> Any:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
    logits = x @ params[-1]["weight"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits.argmax(1) == y).mean()


def main(*, images: int = 32_000, folder: Path | None = None) -> None:
    """Train on IMAGES images, with snapshots in FOLDER (empty; by default a temporary one); then compare lengths."""
    data, rng, order = open_dataset("digits"), np.random.default_rng(0), np.random.default_rng(0).permutation(1797)
    x, y = data.format.codec.encode(data.read(order)).reshape(1797, 64), data.labels(order).astype(np.int32)
    shapes, he = ((64, 64), (64, 64), (64, 10)), (2 / 64) ** 0.5
    params = [{"weight": jnp.asarray(he * rng.standard_normal(s), "float32"), "bias": jnp.zeros(s[1])} for s in shapes]
    optimizer = optax.chain(optax.adam(0.01), power_ema(t_delta=BATCH))  # averages of lengths 0.05 and 0.10
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss, has_aux=True)(params, x, y)[0], state, params)
        return optax.apply_updates(params, updates), state

    with TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        for seen in range(BATCH, images + 1, BATCH):
            picks, noise = rng.integers(TRAINING, size=BATCH), rng.standard_normal((BATCH, 64), np.float32)
            params, state = step(params, state, x[picks] + 0.5 * noise, y[picks])
            if seen % SAVE_EVERY == 0:
                save(folder, state[-1])
        choices = {"raw": params} | {f"{s:.2f}": reconstruct(folder, sigma_rel=s, like=params) for s in LENGTHS}
    print("length  held-out loss  accuracy")
    for name, weights in choices.items():
        print("{:6}  {:13.4f}  {:8.1%}".format(name, *loss(weights, x[TRAINING:], y[TRAINING:])))


if __name__ == "__main__":
    tyro.cli(main)
