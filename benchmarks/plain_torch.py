"""EDM2 in plain eager PyTorch, written in the obvious way: what the port is measured against.

Every function of Figure 22 is a pass of its own over the activations. Weights are normalized in each layer's forward
pass, and the stored ones there too (Algorithm 1); attention is two einsums in the precision of its input; Adam is the
default; averages are moved tensor by tensor. In float16, embedding, weights, norms and loss stay in float32, and the
loss is scaled. It stands in for the official implementation, with which it shares no line.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.torch.step import Batch
from edm2_core.ema import beta
from edm2_core.loss import loss as element_loss
from edm2_core.network import Block, NetworkConfig, initialize, plan
from edm2_core.precond import precondition
from edm2_core.sampler import noise_levels

LENGTHS = (0.05, 0.10)
LOSS_SCALING = {torch.float16: 100.0}


class PlainEDM2:
    """CONFIG G, in training."""

    def __init__(
        self,
        config: NetworkConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        params: Mapping[str, np.ndarray] | None = None,
    ):
        self.config, self.dtype, self.scaling = config, dtype, LOSS_SCALING.get(dtype, 1.0)
        self.p = {name: torch.tensor(a, device=device) for name, a in (params or initialize(config, seed=0)).items()}
        self.trained = {name: self.p[name].requires_grad_() for name, q in plan(config).parameters.items() if q.trained}
        self.optimizer = torch.optim.Adam(self.trained.values(), betas=(0.9, 0.99), eps=1e-8)
        self.emas = {length: {n: w.detach().clone() for n, w in self.trained.items()} for length in LENGTHS}
        self.nimg = 0

    def step(self, batch: Batch, *, lr: float) -> Tensor:
        """Train on a batch; returns its mean loss."""
        x = batch.images + batch.unit_noise * batch.sigma
        denoised, c_noise = self.denoised(x, batch.sigma, batch.labels)
        features = self.fourier("logvar_fourier", c_noise)
        logvar = self.layer("logvar_linear", features).reshape(-1, 1, 1, 1)
        loss = element_loss(denoised, batch.images, batch.sigma, logvar, sigma_data=self.config.sigma_data)
        self.optimizer.zero_grad()
        (loss.sum() * (self.scaling / len(x))).backward()
        for weight in self.trained.values():
            assert weight.grad is not None
            weight.grad /= self.scaling
            torch.nan_to_num(weight.grad, nan=0, posinf=0, neginf=0, out=weight.grad)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.nimg += len(x)
        self.update_averages(len(x))
        return loss.detach().mean()

    @torch.no_grad()
    def update_averages(self, images: int) -> None:
        for length, average in self.emas.items():
            stay = beta(length, t_next=self.nimg, t_delta=images)
            for name, weight in self.trained.items():
                average[name].lerp_(weight, 1 - stay)

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """D(x; sigma) and c_noise [N]."""
        c = precondition(sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.flatten()
        output = self.unet((x * c.c_in).to(self.dtype), c_noise, labels).float()
        return c.c_skip * x + c.c_out * output, c_noise

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None, *, guidance: float = 1.0, num_steps: int = 32) -> Tensor:
        """Heun's method of 2 num_steps - 1 evaluations; guided by the same network without its label."""

        def denoise(x: Tensor, level: float) -> Tensor:
            sigma = x.new_full((len(x), 1, 1, 1), level)
            answer = self.denoised(x, sigma, labels)[0]
            if guidance == 1:
                return answer
            assert labels is not None
            return self.denoised(x, sigma, torch.zeros_like(labels))[0].lerp(answer, guidance)

        levels: Sequence[float] = noise_levels(num_steps)
        x = noise * levels[0]
        for level, target in pairwise(levels):
            slope = (x - denoise(x, level)) / level
            ahead = x + (target - level) * slope
            if target > 0:
                slope = (slope + (ahead - denoise(ahead, target)) / target) / 2
                ahead = x + (target - level) * slope
            x = ahead
        return x

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
        y = self.layer(f"{name}.conv_res1", mp_silu(y * scale[:, :, None, None].to(y.dtype)))
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
        if torch.is_grad_enabled():
            with torch.no_grad():
                weight.copy_(normalize(weight))
        w = (normalize(weight) * (gain / sqrt(prod(weight.shape[1:])))).to(x.dtype)
        return x @ w.T if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)

    def fourier(self, name: str, x: Tensor) -> Tensor:
        return torch.cos(torch.outer(x, self.p[f"{name}.freqs"]) + self.p[f"{name}.phases"]) * sqrt(2)


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (1e-4 + norm * sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    scale = sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (scale / sqrt(a.shape[1])), b * (scale / sqrt(b.shape[1]))], dim=1)
