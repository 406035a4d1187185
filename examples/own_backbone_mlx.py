"""A custom backbone in MLX: a small MLP on points of two half circles, one per class.

Preconditioning, loss, training step, averages and sampler of EDM2 take any module ``(x, c_noise, labels)``.
"""

from math import pi

import mlx.core as mx
import tyro
from mlx import nn

from backends.mlx.api import Denoiser, sample
from backends.mlx.step import Batch, Learner
from edm2_core.loss import noise_level

LENGTH = 0.10  # sigma_rel of the average


class MLP(nn.Module):
    """The raw network F: x [N, 2], c_noise [N] and one-hot labels [N, 2] or None to [N, 2]."""

    def __init__(self, width: int):
        super().__init__()
        self.freqs = 2 ** mx.arange(4.0)
        self.enter, self.middle, self.leave = nn.Linear(12, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.freeze(keys="freqs", recurse=False)

    def __call__(self, x: mx.array, c_noise: mx.array, labels: mx.array | None) -> mx.array:
        angles = c_noise[:, None] * self.freqs  # (N, 4)
        one_hot = mx.zeros_like(x) if labels is None else labels
        h = mx.concatenate([x, mx.cos(angles), mx.sin(angles), one_hot], axis=1)  # (N, 12)
        h = nn.silu(self.enter(h))  # (N, width)
        return self.leave(h + nn.silu(self.middle(h)))


def moons(labels: mx.array, noise: float = 0.03) -> mx.array:
    """Points [N, 2] on the half circle of their class, with a standard deviation of about 0.5."""
    angle, side = pi * mx.random.uniform(shape=labels.shape), 1 - 2 * labels
    curve = mx.stack([mx.cos(angle) - side / 2, side * (mx.sin(angle) - 0.25)], axis=1)
    return 0.6 * curve + noise * mx.random.normal(curve.shape)


def distance(points: mx.array, labels: mx.array) -> mx.array:
    """The distance of each point from the half circle of its class."""
    side = 1 - 2 * labels
    x, y = points[:, 0] / 0.6 + side / 2, side * points[:, 1] / 0.6 + 0.25
    ends = mx.sqrt(mx.square(mx.abs(x) - 1) + mx.square(y))
    return 0.6 * mx.where(y >= 0, mx.abs(mx.sqrt(x * x + y * y) - 1), ends)


def main(*, images: int = 1 << 18, batch: int = 512, width: int = 64, samples: int = 512) -> None:
    """Train on IMAGES points, then sample with raw and averaged weights; print the distances from the true curve."""
    mx.random.seed(0)
    denoiser = Denoiser(MLP(width), label_dim=2)
    learner = Learner(denoiser, sigma_rels=[LENGTH])
    while learner.nimg < images:
        labels = mx.random.randint(0, 2, [batch])
        x, sigma = moons(labels), noise_level(mx.random.normal([batch, 1]), P_mean=-1.2, P_std=1.2)
        learner.step(Batch(x, mx.random.normal(x.shape), sigma, mx.eye(2)[labels]), lr=0.02)
    labels = mx.arange(samples) % 2
    noise, one_hot = mx.random.normal([samples, 2]), mx.eye(2)[labels]
    print("weights   mean distance  within 0.1")
    for name, weights in {"raw": None, "averaged": learner.ema.arrays(LENGTH)}.items():
        if weights is not None:
            denoiser.load_weights(list(weights.items()))
        distances = distance(sample(denoiser, noise, one_hot, num_steps=16, sigma_max=10.0), labels)
        print(f"{name:8}  {distances.mean().item():13.4f}  {(distances < 0.1).mean().item():10.1%}")


if __name__ == "__main__":
    tyro.cli(main)
