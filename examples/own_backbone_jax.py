"""A custom backbone in JAX: a small MLP on 2-D points, with EDM2's preconditioning, loss, averages and sampler."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array

from backends.jax.api import sample
from backends.jax.denoiser import Network, denoiser
from backends.jax.ema import power_ema
from backends.jax.step import TrainState, draw_batch, make_step

WIDTH, SIGMA_DATA = 64, 0.5


def init(key: Array) -> Any:
    """Parameters of three layers; the input is a point, four features of the noise level and a one-hot label."""
    shapes = ((2 + 4 + 2, WIDTH), (WIDTH, WIDTH), (WIDTH, 2))
    keys = jax.random.split(key, len(shapes))
    weights = [jax.random.normal(k, shape) / shape[0] ** 0.5 for k, shape in zip(keys, shapes, strict=True)]
    return [{"w": w, "b": jnp.zeros(w.shape[1])} for w in weights]


def backbone(params: Any, x: Array, c_noise: Array, labels: Array | None, /, *, key: Array | None) -> Array:
    """The raw network F: x [N, 2], c_noise [N] and labels [N, 2] to [N, 2]."""
    level = jnp.stack([f(k * c_noise) for f in (jnp.sin, jnp.cos) for k in (1, 3)], axis=1)  # [N, 4]
    one_hot = jnp.zeros_like(x) if labels is None else labels
    y = jnp.concatenate([x, level, one_hot], axis=1)  # [N, 8]
    for layer in params[:-1]:
        y = jax.nn.silu(y @ layer["w"] + layer["b"])  # [N, WIDTH]
    return y @ params[-1]["w"] + params[-1]["b"]


def moons(key: Array, count: int) -> tuple[Array, Array]:
    """Points [count, 2] on two half circles, and one-hot labels [count, 2] of the half circles."""
    label_key, angle_key = jax.random.split(key)
    label, angle = jax.random.bernoulli(label_key, 0.5, (count,)), jnp.pi * jax.random.uniform(angle_key, (count,))
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], axis=1)
    return 0.5 * jnp.where(label[:, None], -upper, upper), jax.nn.one_hot(label.astype(int), 2)


def main(*, steps: int = 2000, batch: int = 256, lr: float = 0.003, seed: int = 0) -> None:
    """Train for STEPS steps of BATCH points, then sample points of each label from an average of the weights."""
    denoise = denoiser(backbone, sigma_data=SIGMA_DATA)
    optimizer = optax.chain(optax.adam(optax.cosine_decay_schedule(lr, steps)), power_ema((0.05, 0.10)))
    step = make_step(denoise, optimizer, sigma_data=SIGMA_DATA)

    @jax.jit
    def train_step(state: TrainState, key: Array) -> Any:
        points_key, noise_key = jax.random.split(key)
        points, labels = moons(points_key, batch)
        drawn, _ = draw_batch(points, labels, noise_key, P_mean=-1.2, P_std=1.2)
        return step(state, drawn)

    key = jax.random.key(seed)
    params = init(key)
    state = TrainState(params, optimizer.init(params))
    for i in range(1, steps + 1):
        state, metrics = train_step(state, jax.random.fold_in(key, i))
        if i % max(steps // 5, 1) == 0:
            print(f"step {i:5}  loss {float(metrics.loss):.3f}")
    network = Network(denoise, state.opt_state[-1].averages["0.1"], label_dim=2)
    labels = jax.nn.one_hot(jnp.arange(1000) % 2, 2)
    points = sample(network, jax.random.normal(key, (1000, 2)), labels, num_steps=16)
    curve = moons(jax.random.key(1), 4000)
    for label in range(2):
        same, other = (curve[0][curve[1][:, label] == value] for value in (1, 0))
        samples = points[labels[:, label] == 1]
        near, far = (jnp.linalg.norm(samples[:, None] - c, axis=-1).min(axis=1).mean() for c in (same, other))
        print(f"label {label}: mean distance from its half circle {near:.3f}, from the other {far:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
