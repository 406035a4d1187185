"""Autoguidance on a 2-D density (arXiv 2406.02507): points of two classes, each a branching arm, and a small network.

The network scatters points between the branches, where its prediction is uncertain. The guide, a smaller network with
less training, makes the same errors, only larger. Guidance extrapolates from the guide's prediction past that of the
network, which moves points back to the branches. Samples become more likely but less diverse.
"""

import sys
from cmath import rect
from math import pi
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, distributions, nn

from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.pictures import save_rows
from backends.torch.ema import PowerEMA
from edm2_core.loss import loss, noise_level
from edm2_core.mp import force_weight_norm, mp_cat, mp_fourier, mp_silu, mp_sum, mp_weight
from edm2_core.precond import precondition
from edm2_core.sampler import Denoiser, guided, sample
from edm2_core.schedule import learning_rate

BATCH, POINTS, PIXELS, BLOCKS = 1024, 16384, 320, 3
ORANGE, BLUE, PAPER = np.array([1.0, 0.5, 0.05]), np.array([0.1, 0.4, 0.8]), np.array([0.96, 0.97, 0.98])


def branch(base: complex, step: complex, forks: int) -> list[tuple[complex, float, float]]:
    """Gaussians along a branch (centre, width, mass), and along the two smaller ones that fork from its tip."""
    along = [(base + step * k / 8, abs(step) / 14, 2.0**forks) for k in range(8)]
    turns = (rect(0.8, -0.5), rect(0.62, 0.6)) if forks else ()
    return along + [gaussian for turn in turns for gaussian in branch(base + step, step * turn, forks - 1)]


def arm() -> distributions.Distribution:
    """The true density of class 0. That of class 1 is rotated by 180 degrees: x becomes -x."""
    centres, widths, masses = (torch.tensor(c) for c in zip(*branch(-1 + 0.3j, rect(0.5, 0.35), 4), strict=True))
    scale = 0.5 / (masses / masses.sum() @ centres.abs() ** 2 / 2).sqrt()  # 0.5 is the sigma_data of precondition
    parts = distributions.Normal(torch.view_as_real(centres * scale), (widths * scale)[:, None])
    return distributions.MixtureSameFamily(distributions.Categorical(masses), distributions.Independent(parts, 1))


class Net(nn.Module):
    """A magnitude-preserving MLP: activations have unit variance for any weights."""

    def __init__(self, width: int):
        super().__init__()
        shapes = {"embed": (width, 32 + 1), "enter": (width, 2 * 32), "leave": (2, width), "logvar": (1, 32)}
        shapes |= {f"block{i}": (width, width) for i in range(BLOCKS)}
        self.weights = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
        self.gain = nn.Parameter(torch.zeros(()))
        self.freqs, self.phases = nn.Buffer(4 * torch.randn(32)), nn.Buffer(2 * pi * torch.rand(32))

    def layer(self, name: str, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        return x @ mp_weight(self.weights[name], gain=gain).T

    def forward(self, x: Tensor, sigma: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """Denoised points [N, 2] and uncertainty [N, 1]; the label ``sign`` [N, 1] is 1 or -1, of unit variance."""
        c = precondition(sigma)
        noise = mp_fourier(c.c_noise[:, 0], self.freqs, self.phases)
        emb = self.layer("embed", mp_cat(noise, sign, axis=1))
        h = self.layer("enter", mp_fourier(x * c.c_in, self.freqs, self.phases).flatten(1))
        for i in range(BLOCKS):
            h = mp_sum(h, self.layer(f"block{i}", mp_silu(h * emb)))
        return c.c_skip * x + c.c_out * self.layer("leave", h, self.gain), self.layer("logvar", noise)


def train(data: Tensor, *, width: int, images: int) -> Net:
    """Train a network on points [N, 2] and return its average, whose samples depend less on the last batches."""
    net = Net(width)
    optimizer, ema = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99)), PowerEMA(net, sigma_rels=[0.1])
    for seen in range(BATCH, images + 1, BATCH):
        with torch.no_grad():  # forced weight normalization, before each step
            for weight in net.weights.values():
                weight.copy_(force_weight_norm(weight))
        sign, sigma = torch.randn(BATCH, 1).sign(), noise_level(torch.randn(BATCH, 1), P_mean=-2.3, P_std=1.5)
        x = sign * data[torch.randint(len(data), (BATCH,))]
        denoised, logvar = net(x + sigma * torch.randn_like(x), sigma, sign)
        optimizer.zero_grad()
        loss(denoised, x, sigma, logvar).mean().backward()
        optimizer.param_groups[0]["lr"] = learning_rate(seen, batch=BATCH, ref_lr=0.02, ref_batches=512, rampup_nimg=0)
        optimizer.step()
        ema.update(time=seen, delta=BATCH)
    net.load_state_dict(ema.arrays(0.1))
    return net


def picture(x: Tensor) -> np.ndarray:
    """A picture, uint8 [3, PIXELS, PIXELS], of the points: the first half in orange, the second in blue."""
    page = PAPER
    for ink, part in zip((ORANGE, BLUE), x.numpy().reshape(2, -1, 2), strict=True):
        counts, *_ = np.histogram2d(-part[:, 1], part[:, 0], bins=PIXELS, range=[(-1.3, 1.3)] * 2)
        page = page * (ink + (1 - ink) * np.exp(-counts)[..., None])
    return np.rint(255 * page.transpose(2, 0, 1)).astype(np.uint8)


def main(*, images: int = 1 << 20, guidance: float = 2.0, out: Path = Path("toy_2d.png")) -> None:
    """Train on IMAGES points (the guide on a 16th of them); draw data, unguided and guided samples into OUT."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are too small to use more
    truth, sign = arm(), torch.ones(POINTS, 1)
    sign[POINTS // 2 :] = -1
    data, noise = truth.sample((POINTS,)), torch.randn(POINTS, 2)

    def denoiser(net: Net) -> Denoiser:
        return lambda x, sigma: net(x, torch.full_like(sign, sigma), sign)[0]

    net, guide = denoiser(train(data, width=64, images=images)), denoiser(train(data, width=32, images=images // 16))
    with torch.no_grad():
        samples = [sample(d, noise, num_steps=24, sigma_max=5.0) for d in (net, guided(net, guide, guidance=guidance))]
    points = dict(zip(("data", "unguided", "guided"), (sign * data, *samples), strict=True))
    least = truth.log_prob(data).quantile(0.01)
    print("          median log density  outliers: below the density of 99% of the data")
    for name, x in points.items():
        density = truth.log_prob(sign * x)
        print(f"{name:8}  {density.median():18.2f}  {(density < least).float().mean():8.1%}")
    save_rows(out, [("", np.stack([picture(x) for x in points.values()]))])


if __name__ == "__main__":
    sys.exit(tyro.cli(command(main)))
