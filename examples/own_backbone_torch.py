"""A custom backbone in PyTorch: a small transformer on digits, with EDM2's preconditioning, loss, averages and sampler.

``Denoiser`` preconditions any module, ``Learner`` trains it and tracks its averages, ``sample`` samples from it. The
samples are then classified by the nearest class mean, which classifies 90% of real digits correctly.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.pictures import save_grid, visible
from backends.torch.api import Denoiser, sample
from backends.torch.step import Batch, Learner
from edm2_core.loss import noise_level
from edm2_core.schedule import learning_rate

BATCH, WIDTH = 128, 64


class Transformer(nn.Module):
    """The raw network F: a token for each patch of 2x2 pixels, conditioned on noise level and label by addition."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.freqs = nn.Buffer(torch.randn(WIDTH) * 2)
        self.noise, self.label = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(10, WIDTH, bias=False)
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.position = nn.Parameter(torch.randn(16, WIDTH) * 0.1)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        angles = c_noise[:, None] * self.freqs  # (N, WIDTH)
        emb = self.noise(torch.cat([angles.cos(), angles.sin()], dim=1))  # (N, WIDTH)
        emb = emb if labels is None else emb + self.label(labels)
        tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)  # (N, 1, 8, 8) to (N, 16, 4)
        y = self.blocks(self.enter(tokens) + self.position + emb[:, None])  # (N, 16, WIDTH)
        y = self.leave(y).transpose(1, 2).unflatten(2, (4, 4))  # (N, 4, 4, 4)
        return F.pixel_shuffle(y, 2)  # (N, 1, 8, 8)


def main(*, images: int = 128_000, out: Path = Path("own_backbone.png")) -> float:
    """Train on IMAGES digits, draw ten of each into OUT, and return the share classified as their label."""
    torch.manual_seed(0)
    data = open_dataset("digits")
    indices = np.arange(len(data))
    x, ids = torch.from_numpy(data.format.codec.encode(data.read(indices))), torch.from_numpy(data.labels(indices))
    uncertainty = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 1))
    denoiser = Denoiser(Transformer(), uncertainty=uncertainty, label_dim=10)
    learner = Learner(denoiser)  # with averages of length 0.05 and 0.10
    while learner.nimg < images:
        picks = torch.randint(len(x), (BATCH,))
        sigma = noise_level(torch.randn(BATCH, 1, 1, 1), P_mean=-0.4, P_std=1.2)
        one_hot = F.one_hot(ids[picks], 10).float() * (torch.rand(BATCH, 1) > 0.1)  # drop one label in ten
        lr = learning_rate(learner.nimg, batch=BATCH, ref_lr=0.002, ref_batches=500, rampup_nimg=10_000)
        learner.step(Batch(x[picks], torch.randn_like(x[picks]), sigma, one_hot), lr=lr)
    with learner.ema.applied(0.10, denoiser):
        wanted = torch.arange(10).repeat(10)
        digits = sample(denoiser, torch.randn(100, 1, 8, 8), F.one_hot(wanted, 10).float(), num_steps=18)
    save_grid(out, visible(digits.numpy(), data.format))
    means = torch.stack([x[ids == digit].mean(dim=0) for digit in range(10)])
    predicted = torch.cdist(digits.flatten(1), means.flatten(1)).argmin(dim=1)
    share = float((predicted == wanted).float().mean())
    print(f"{share:.0%} of the samples are classified as their label; see {out}")
    return share


if __name__ == "__main__":
    tyro.cli(main)
