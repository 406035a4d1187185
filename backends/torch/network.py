"""The EDM2 network as PyTorch modules that walk the plan.

``state_dict`` has the canonical parameter names and layouts. ``forward`` is pure: no buffer or weight is written, so
``torch.func``, ``torch.compile`` and CUDA graphs see a plain function; forced weight normalization belongs to the step.
Fourier constants are buffers. Activations run in ``dtype``; the noise-conditioned path, weights and norms in float32.

Constants of magnitude-preserving functions (1/0.596 of mp_silu, the blend of mp_sum) ride on the gain of the next or
last convolution, where they cost nothing, instead of on the activations, where each is a pass over memory.
"""

from math import prod, sqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2_core.mp import SILU_RMS
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import precondition


def normalize(x: Tensor, dims: tuple[int, ...], *, eps: float = 1e-4) -> Tensor:
    """Scale to unit root mean square over ``dims``, norms in float32 or better. See :func:`edm2_core.mp.normalize`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    scale = (norm * (1 / sqrt(prod(x.shape[d] for d in dims)))).add_(eps)
    return x / scale.to(x.dtype)


def blend(t: float) -> tuple[float, float]:
    """Factors of a and b in mp_sum(a, b, t)."""
    scale = 1 / sqrt((1 - t) ** 2 + t**2)
    return (1 - t) * scale, t * scale


class Fourier(nn.Module):
    """sqrt(2) cos(freqs x + phases), [N] to [N, channels]. See :func:`edm2_core.mp.mp_fourier`."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.zeros(channels))
        self.register_buffer("phases", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(torch.outer(x, self.freqs) + self.phases) * sqrt(2)


class Layer(nn.Module):
    """A convolution, or a linear layer where the weight has two axes, with magnitude-preserving weight."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def effective_weight(self, gain: float | Tensor = 1.0) -> Tensor:
        fan_in = prod(self.weight.shape[1:])
        return normalize(self.weight, tuple(range(1, self.weight.ndim))) * (gain * (1 / sqrt(fan_in)))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        w = self.effective_weight(gain).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class UNetBlock(nn.Module):
    """One encoder or decoder block of Figure 22. See :func:`edm2_core.reference.run_block`."""

    def __init__(self, config: NetworkConfig, block: Block):
        super().__init__()
        self.config, self.block = config, block
        channels = block.out_channels
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = Layer(channels, block.residual_channels, 3, 3)
        self.emb_linear = Layer(channels, config.emb_channels)
        self.conv_res1 = Layer(channels, channels, 3, 3)
        self.conv_skip = Layer(channels, block.in_channels, 1, 1) if block.has_conv_skip else None
        self.attn_qkv = Layer(3 * channels, channels, 1, 1) if block.heads else None
        self.attn_proj = Layer(channels, channels, 1, 1) if block.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        config, block = self.config, self.block
        x = resample(x, block.resample, config.resample_filter)
        if block.role == "enc":
            x = normalize(self.conv_skip(x) if self.conv_skip is not None else x, (1,))
        keep, add = blend(config.res_balance)
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res0(F.silu(x), gain=1 / SILU_RMS)
        y = F.silu(y * scale[:, :, None, None].to(y.dtype))
        y = F.dropout(y, config.dropout, self.training and config.dropout > 0)
        y = self.conv_res1(y, gain=add / SILU_RMS)
        if block.role == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = torch.add(y, x, alpha=keep)
        if block.heads:
            keep, add = blend(config.attn_balance)
            x = torch.add(self.attention(x, gain=add), x, alpha=keep)
        return x if config.clip_act is None else x.clamp(-config.clip_act, config.clip_act)

    def attention(self, x: Tensor, *, gain: float) -> Tensor:
        """Cosine self-attention over pixels. See :func:`edm2_core.reference.attention`."""
        n, c, h, w = x.shape
        heads = self.block.heads
        weight = cast(Layer, self.attn_qkv).effective_weight()
        # stored [heads, channels per head, (q, k, v)]; regrouped so that q, k and v each lie together in memory
        weight = weight.unflatten(0, (heads, c // heads, 3)).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
        qkv = F.conv2d(x, weight.to(x.dtype)).reshape(n, 3 * heads, c // heads, h * w)
        q, k, v = normalize(qkv, (2,)).transpose(2, 3).unflatten(1, (3, heads)).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return cast(Layer, self.attn_proj)(y.transpose(2, 3).reshape(n, c, h, w), gain=gain)


class UNet(nn.Module):
    """The raw network F. See :func:`edm2_core.reference.unet`."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, walk = config, plan(config)
        self.emb_fourier = Fourier(config.noise_channels)
        self.emb_noise = Layer(config.emb_channels, config.noise_channels)
        self.emb_label = Layer(config.emb_channels, config.label_dim) if config.label_dim else None
        self.enc = nn.ModuleDict({short(block): module(config, block) for block in walk.encoder})
        self.dec = nn.ModuleDict({short(block): module(config, block) for block in walk.decoder})
        self.takes_skip = [block.takes_skip for block in walk.decoder]
        self.out_conv = Layer(config.img_channels, walk.decoder[-1].out_channels, 3, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.embedding(c_noise, labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, Layer) else block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.dec.values(), self.takes_skip, strict=True):
            x = block(self.join(x, skips.pop()) if takes_skip else x, emb)
        return self.out_conv(x, gain=self.out_gain)

    def embedding(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            keep, add = blend(self.config.label_balance)
            emb = emb * keep
            if labels is not None:
                emb = emb + self.emb_label(labels, gain=add * sqrt(self.config.label_dim))
        return F.silu(emb) / SILU_RMS

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """See :func:`edm2_core.mp.mp_cat`."""
        t, channels = self.config.concat_balance, a.shape[1] + b.shape[1]
        scale = sqrt(channels / ((1 - t) ** 2 + t**2))
        return torch.cat([a * (scale * (1 - t) / sqrt(a.shape[1])), b * (scale * t / sqrt(b.shape[1]))], dim=1)


class Network(nn.Module):
    """The denoiser D and its uncertainty u. See :func:`edm2_core.reference.denoise`.

    Args:
        config: what the plan is made of.
        dtype: of activations: float32, bfloat16 or float16.
    """

    def __init__(self, config: NetworkConfig, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.unet = UNet(config)
        self.logvar_fourier = Fourier(config.logvar_channels)
        self.logvar_linear = Layer(1, config.logvar_channels)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 x [N, C, H, W], sigma [N, 1, 1, 1] and labels [N, label_dim] or None to denoised and logvar."""
        c = precondition(sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.flatten()
        output = self.unet((x * c.c_in).to(self.dtype), c_noise, labels).to(x.dtype)
        logvar = self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return torch.addcmul(c.c_skip * x, c.c_out, output), logvar


def module(config: NetworkConfig, block: Block) -> nn.Module:
    return Layer(block.out_channels, block.in_channels, 3, 3) if block.role == "conv" else UNetBlock(config, block)


def short(block: Block) -> str:
    return block.name.rpartition(".")[2]


def resample(x: Tensor, mode: str, taps: tuple[float, ...]) -> Tensor:
    """See :func:`edm2_core.mp.resample`."""
    if mode == "keep":
        return x
    if len(taps) == 2 and taps[0] == taps[1]:
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
    f = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
    kernel, pad, channels = torch.outer(f, f)[None, None], (len(taps) - 1) // 2, x.shape[1]
    apply = F.conv2d if mode == "down" else F.conv_transpose2d
    kernel = kernel if mode == "down" else kernel * 4
    return apply(x, kernel.expand(channels, 1, -1, -1), stride=2, padding=pad, groups=channels)
