"""Time of a training step of the PyTorch port and of a direct implementation of the paper.

    python -m benchmarks.torch_step [--preset-name digits]

The direct step computes every function of Figure 22 as its own pass over the activations, Algorithm 1 in the forward
pass, default Adam, and the averages tensor by tensor. Steps of the two alternate, so that other load on the machine
slows both; medians are compared. The update of the two averages is also timed by itself.
"""

import sys
import time
from collections.abc import Callable
from math import prod, sqrt
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from backends.torch.device import choose, describe
from backends.torch.port import PORT
from backends.torch.step import Batch, Learner
from backends.torch.weights import build
from edm2_core.ema import beta
from edm2_core.loss import loss as element_loss
from edm2_core.network import Block, NetworkConfig, initialize, plan
from edm2_core.precond import precondition
from edm2_core.presets import preset


class Direct:
    """CONFIG G as a direct implementation of Figure 22 and Algorithm 1."""

    def __init__(self, config: NetworkConfig, device: torch.device):
        self.config = config
        self.p = {name: torch.tensor(a, device=device) for name, a in initialize(config, seed=0).items()}
        self.trained = {name: self.p[name].requires_grad_() for name, q in plan(config).parameters.items() if q.trained}
        self.optimizer = torch.optim.Adam(self.trained.values(), betas=(0.9, 0.99), eps=1e-8)
        self.emas = {s: {n: w.detach().clone() for n, w in self.trained.items()} for s in (0.05, 0.10)}
        self.nimg = 0

    def step(self, batch: Batch, *, lr: float) -> None:
        x = batch.images + batch.unit_noise * batch.sigma
        c = precondition(batch.sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.flatten()
        denoised = c.c_skip * x + c.c_out * self.unet(x * c.c_in, c_noise, batch.labels)
        features = self.fourier("logvar_fourier", c_noise)
        logvar = self.layer("logvar_linear", features).reshape(-1, 1, 1, 1)
        loss = element_loss(denoised, batch.images, batch.sigma, logvar, sigma_data=self.config.sigma_data)
        self.optimizer.zero_grad()
        (loss.sum() / len(x)).backward()
        for weight in self.trained.values():
            assert weight.grad is not None
            torch.nan_to_num(weight.grad, nan=0, posinf=0, neginf=0, out=weight.grad)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.nimg += len(x)
        with torch.no_grad():
            for sigma_rel, ema in self.emas.items():
                stay = beta(sigma_rel, t_next=self.nimg, t_delta=len(x))
                for name, weight in self.trained.items():
                    ema[name].lerp_(weight, 1 - stay)

    def unet(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.layer("unet.emb_noise", self.fourier("unet.emb_fourier", c_noise))
        if labels is not None:
            emb = mp_sum(emb, self.layer("unet.emb_label", labels * sqrt(labels.shape[1])), 0.5)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for block in plan(self.config).encoder:
            x = self.layer(block.name, x) if block.role == "conv" else self.block(block, x, emb)
            skips.append(x)
        for block in plan(self.config).decoder:
            x = mp_cat(x, skips.pop()) if block.takes_skip else x
            x = self.block(block, x, emb)
        return self.layer("unet.out_conv", x, self.p["unet.out_gain"])

    def block(self, block: Block, x: Tensor, emb: Tensor) -> Tensor:
        name = block.name
        if block.resample != "keep":
            x = F.avg_pool2d(x, 2) if block.resample == "down" else F.interpolate(x, scale_factor=2)
        if block.role == "enc":
            x = normalize(self.layer(f"{name}.conv_skip", x) if block.has_conv_skip else x, 1)
        y = self.layer(f"{name}.conv_res0", mp_silu(x))
        scale = self.layer(f"{name}.emb_linear", emb, self.p[f"{name}.emb_gain"]) + 1
        y = self.layer(f"{name}.conv_res1", mp_silu(y * scale[:, :, None, None]))
        if block.role == "dec" and block.has_conv_skip:
            x = self.layer(f"{name}.conv_skip", x)
        x = mp_sum(x, y, 0.3)
        if block.heads:
            n, c, h, w = x.shape
            qkv = self.layer(f"{name}.attn_qkv", x).reshape(n, block.heads, c // block.heads, 3, h * w)
            q, k, v = normalize(qkv, 2).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / sqrt(c // block.heads)).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, h, w)
            x = mp_sum(x, self.layer(f"{name}.attn_proj", y), 0.3)
        return x.clamp(-256, 256)

    def layer(self, name: str, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        weight = self.p[f"{name}.weight"]
        with torch.no_grad():
            weight.copy_(normalize(weight))
        w = normalize(weight) * (gain / sqrt(prod(weight.shape[1:])))
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    def fourier(self, name: str, x: Tensor) -> Tensor:
        return torch.cos(torch.outer(x, self.p[f"{name}.freqs"]) + self.p[f"{name}.phases"]) * sqrt(2)


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / (1e-4 + norm * sqrt(norm.numel() / x.numel()))


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    scale = sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (scale / sqrt(a.shape[1])), b * (scale / sqrt(b.shape[1]))], dim=1)


def make_batch(config: NetworkConfig, size: int, device: torch.device) -> Batch:
    draw = torch.Generator().manual_seed(0)
    shape = (size, config.img_channels, *config.image_size)
    images, noise = (torch.randn(shape, generator=draw) for _ in range(2))
    sigma = torch.randn((size, 1, 1, 1), generator=draw).exp()
    labels = torch.eye(config.label_dim)[torch.arange(size) % config.label_dim] if config.label_dim else None
    return Batch(*(None if x is None else x.to(device) for x in (images * 0.5, noise, sigma, labels)))  # type: ignore


def seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(preset_name: str = "digits", batch: int = 128, steps: int = 30, device: str | None = None) -> None:
    """Time the two steps.

    Args:
        preset_name: preset with the network.
        batch: images per step.
        steps: how many of each to time, after three to warm up.
        device: device to compute on; the fastest by default.
    """
    place, config = choose(device), preset(preset_name).network
    network = build(config, initialize(config, seed=0), device=place)
    ours, direct = Learner(network), Direct(config, place)
    inputs = make_batch(config, batch, place)
    candidates: dict[str, Callable[[], object]] = {
        "direct step": lambda: direct.step(inputs, lr=0.01),
        "our step": lambda: ours.step(inputs, lr=0.01),
        "of it, 2 averages": lambda: ours.ema.update(time=ours.nimg, delta=batch),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(steps + 3):
        for name, function in candidates.items():
            duration = seconds(function, place)
            if i >= 3:
                times[name].append(duration)
    base = median(times["our step"])
    print(f"{preset_name}, batch {batch}, float32, {describe(place)}, median of {steps}")
    for name, values in times.items():
        print(f"{name:18s} {median(values) * 1e3:9.2f} ms   {median(values) / base:6.3f} of our step")
    difference = max(np.abs(a - b.detach().cpu().numpy()).max() for a, b in _pairs(ours, direct))
    print(f"largest difference of a weight after these steps {difference:.2e}; port {PORT.name}")


def _pairs(ours: Learner, direct: Direct) -> list[tuple[np.ndarray, Tensor]]:
    return [(ours.weights[name].detach().cpu().numpy(), weight) for name, weight in direct.trained.items()]


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
