"""The EDM2 network as PyTorch modules that walk the plan.

``state_dict`` has the canonical parameter names and layouts. ``forward`` is pure: no buffer or weight is written, so
``torch.func``, ``torch.compile`` and CUDA graphs see a plain function; forced weight normalization belongs to the step.
Fourier constants are buffers. Activations run in ``dtype``; the noise-conditioned path, weights and norms in float32.

Constants of magnitude-preserving functions (1/0.596 of mp_silu, the blend of mp_sum) ride on the gain of the next or
last convolution, where they cost nothing, instead of on the activations, where each is a pass over memory.
"""

from collections.abc import Callable
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm2_core import ladder
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import Preconditioning
from edm2_core.network import GROUP_NORM_EPS


def normalize(x: Tensor, dims: tuple[int, ...], *, eps: float = 1e-4) -> Tensor:
    """Scale to unit root mean square over ``dims``, norms in float32 or better. See :func:`edm2_core.mp.normalize`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    scale = (norm * (1 / sqrt(prod([x.shape[d] for d in dims])))).add_(eps)
    return x / scale.to(x.dtype)


def precondition(sigma: Tensor, *, sigma_data: float) -> Preconditioning:
    """See :func:`edm2_core.precond.precondition`, whose search for its arrays' library torch.compile warns of."""
    variance = sigma.square() + sigma_data**2
    root = variance.sqrt()
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, sigma.log() / 4)


class Fourier(nn.Module):
    """Features of a number, [N] to [N, channels]. See :func:`edm2_core.reference.fourier`."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, config: NetworkConfig, channels: int):
        super().__init__()
        self.scale = config.fourier_scale
        self.register_buffer("freqs", torch.zeros(channels))
        self.register_buffer("phases", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(torch.outer(x, self.freqs) + self.phases) * self.scale


class Layer(nn.Module):
    """A convolution, or a linear layer where the weight has two axes. See :func:`edm2_core.reference.layer`."""

    def __init__(self, config: NetworkConfig, name: str):
        super().__init__()
        table, self.normalized = plan(config).parameters, config.switches.weight_norm
        weight = table[f"{name}.weight"]
        self.scale, self.forced = config.weight_scale(weight.fan_in), weight.normalized
        self.weight = nn.Parameter(torch.zeros(weight.shape))
        biased = f"{name}.bias" in table
        self.bias = nn.Parameter(torch.zeros(weight.shape[0])) if biased else None
        self.watch: Callable[[Tensor], None] | None = None  # is shown what the layer puts out

    def effective_weight(self, gain: float | Tensor = 1.0) -> Tensor:
        w = normalize(self.weight, tuple(range(1, self.weight.ndim))) if self.normalized else self.weight
        return w * (gain * self.scale)

    def forward(self, x: Tensor, gain: float | Tensor = 1.0, *, factor: float = 1.0) -> Tensor:
        """``gain`` is the weight's; ``factor`` that of the whole, bias included."""
        w = self.effective_weight(gain * factor).to(x.dtype)
        bias = None if self.bias is None else (self.bias * factor).to(x.dtype)
        y = F.linear(x, w, bias) if w.ndim == 2 else F.conv2d(x, w, bias, padding=w.shape[-1] // 2)
        return self.seen(y, factor=factor)

    def seen(self, y: Tensor, *, factor: float = 1.0) -> Tensor:
        if self.watch is not None:
            self.watch(y / (factor or 1.0))
        return y


class GroupNorm(nn.Module):
    """See :func:`edm2_core.reference.group_norm`; without groups, nothing."""

    def __init__(self, config: NetworkConfig, name: str, channels: int):
        super().__init__()
        self.kind, self.groups = config.switches.group_norm, config.groups(channels)
        affine = f"{name}.scale" in plan(config).parameters
        self.scale = nn.Parameter(torch.zeros(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is ladder.GroupNorm.NONE:
            return x
        if self.kind is ladder.GroupNorm.PLAIN:
            return normalize(x.unflatten(1, (self.groups, -1)), (2, 3, 4)).flatten(1, 2)
        x = x.contiguous()  # convolutions may answer channels last, of which it has no forward derivative
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.group_norm(x.to(wide), self.groups, self.scale, self.bias, GROUP_NORM_EPS).to(x.dtype)


class UNetBlock(nn.Module):
    """One encoder or decoder block. See :func:`edm2_core.reference.run_block`."""

    def __init__(self, config: NetworkConfig, block: Block):
        super().__init__()
        self.config, self.block = config, block
        name, has = block.name, config.switches
        self.emb_gain = nn.Parameter(torch.zeros(())) if has.gains else None
        self.norm_res0 = GroupNorm(config, f"{name}.norm_res0", block.residual_channels)
        self.conv_res0 = Layer(config, f"{name}.conv_res0")
        self.emb_linear = Layer(config, f"{name}.emb_linear")
        self.norm_res1 = GroupNorm(config, f"{name}.norm_res1", block.out_channels)
        self.conv_res1 = Layer(config, f"{name}.conv_res1")
        self.conv_skip = Layer(config, f"{name}.conv_skip") if block.has_conv_skip else None
        self.norm_attn = None
        if block.heads:
            if has.attention is ladder.Attention.DOT:
                self.norm_attn = GroupNorm(config, f"{name}.norm_attn", block.out_channels)
            self.attn_qkv = Layer(config, f"{name}.attn_qkv")
            self.attn_proj = Layer(config, f"{name}.attn_proj")

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        config, block, has = self.config, self.block, self.config.switches
        x = self.widened(self.resampled(x, now=has.resample_first), now=block.widens_first)
        if block.role == "enc" and has.pixel_norm:
            x = normalize(x, (1,))
        y = self.resampled(F.silu(self.norm_res0(x)), now=not has.resample_first)
        y = self.norm_res1(self.conv_res0(y, gain=1 / config.silu_rms))
        y = F.silu(self.conditioned(y, emb))
        y = F.dropout(y, config.dropout, self.training and config.dropout > 0)
        keep, add = config.blend(config.res_balance)
        y = self.conv_res1(y, gain=1 / config.silu_rms, factor=add)
        x = self.widened(self.resampled(x, now=not has.resample_first), now=not block.widens_first)
        x = torch.add(y, x, alpha=keep)
        if block.heads:
            keep, add = config.blend(config.attn_balance)
            x = torch.add(self.attention(x, factor=add), x, alpha=keep)
        return x if config.clip_act is None else x.clamp(-config.clip_act, config.clip_act)

    def resampled(self, x: Tensor, *, now: bool) -> Tensor:
        return resample(x, self.block.resample, self.config.resample_filter) if now else x

    def widened(self, x: Tensor, *, now: bool) -> Tensor:
        return self.conv_skip(x) if self.conv_skip is not None and now else x

    def conditioned(self, y: Tensor, emb: Tensor) -> Tensor:
        """See :func:`edm2_core.reference.conditioning`."""
        z = self.emb_linear(emb, gain=1.0 if self.emb_gain is None else self.emb_gain)[:, :, None, None]
        if not self.config.switches.shift:
            return y * (z + 1).to(y.dtype)
        scale, shift = z.chunk(2, dim=1)
        return torch.addcmul(shift.to(y.dtype), y, (scale + 1).to(y.dtype))

    def attention(self, x: Tensor, *, factor: float) -> Tensor:
        """Self-attention over pixels. See :func:`edm2_core.reference.attention`."""
        n, c, h, w = x.shape
        heads, layer = self.block.heads, self.attn_qkv

        def regrouped(rows: Tensor) -> Tensor:
            """Stored [heads, channels per head, (q, k, v)]; so that q, k and v each lie together in memory."""
            return rows.unflatten(0, (heads, c // heads, 3)).movedim(2, 0).flatten(0, 2).to(x.dtype)

        bias = None if layer.bias is None else regrouped(layer.bias)
        qkv = F.conv2d(x if self.norm_attn is None else self.norm_attn(x), regrouped(layer.effective_weight()), bias)
        qkv = layer.seen(qkv).reshape(n, 3 * heads, c // heads, h * w)
        # dot products of what is not normalized may be of any size
        qkv = normalize(qkv, (2,)) if self.norm_attn is None else qkv.to(torch.promote_types(x.dtype, torch.float32))
        q, k, v = qkv.transpose(2, 3).unflatten(1, (3, heads)).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v).to(x.dtype)
        return self.attn_proj(y.transpose(2, 3).reshape(n, c, h, w), factor=factor)


class UNet(nn.Module):
    """The raw network F. See :func:`edm2_core.reference.unet`."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, walk, has = config, plan(config), config.switches
        width = walk.decoder[-1].out_channels
        self.emb_fourier = Fourier(config, config.noise_channels)
        self.emb_noise = Layer(config, "unet.emb_noise")
        self.emb_noise1 = Layer(config, "unet.emb_noise1") if has.embedding_layers == 2 else None
        self.emb_label = Layer(config, "unet.emb_label") if config.label_dim else None
        self.enc = nn.ModuleDict({short(block): module(config, block) for block in walk.encoder})
        self.dec = nn.ModuleDict({short(block): module(config, block) for block in walk.decoder})
        self.takes_skip = [block.takes_skip for block in walk.decoder]
        self.out_norm = GroupNorm(config, "unet.out_norm", width) if has.output_norm else None
        self.out_conv = Layer(config, "unet.out_conv")
        self.out_gain = nn.Parameter(torch.zeros(())) if has.gains else None

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.embedding(c_noise, labels)
        if self.config.switches.ones_channel:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for block in self.enc.values():
            x = block(x) if isinstance(block, Layer) else block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.dec.values(), self.takes_skip, strict=True):
            x = block(self.join(x, skips.pop()) if takes_skip else x, emb)
        gain: float | Tensor = 1.0 if self.out_gain is None else self.out_gain
        if self.out_norm is not None:
            x, gain = F.silu(self.out_norm(x)), gain / self.config.silu_rms
        return self.out_conv(x, gain=gain)

    def embedding(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        config, silu_rms = self.config, self.config.silu_rms
        keep, add = config.blend(config.label_balance) if config.label_dim else (1.0, 1.0)
        emb = self.emb_fourier(c_noise)
        if self.emb_noise1 is not None:
            emb = self.emb_noise1(F.silu(self.emb_noise(emb)), gain=1 / silu_rms, factor=keep)
        else:
            emb = self.emb_noise(emb, factor=keep)
        if self.emb_label is not None and labels is not None:
            scale = sqrt(config.label_dim) if config.switches.label_scaling else 1.0
            emb = emb + self.emb_label(labels, gain=add * scale)
        return F.silu(emb) / silu_rms

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """See :func:`edm2_core.reference.joined`."""
        keep, add = self.config.concat_blend(x.shape[1], skip.shape[1])
        return torch.cat([x, skip], dim=1) if keep == add == 1 else torch.cat([x * keep, skip * add], dim=1)


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
        if config.switches.uncertainty:
            self.logvar_fourier = Fourier(config, config.logvar_channels)
            self.logvar_linear = Layer(config, "logvar_linear")

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 x [N, C, H, W], sigma [N, 1, 1, 1] and labels [N, label_dim] or None to denoised and logvar."""
        c = precondition(sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.flatten()
        output = self.unet((x * c.c_in).to(self.dtype), c_noise, labels).to(x.dtype)
        return torch.addcmul(c.c_skip * x, c.c_out, output), self.uncertainty(c_noise).reshape(-1, 1, 1, 1)

    def uncertainty(self, c_noise: Tensor) -> Tensor:
        """See :func:`edm2_core.reference.uncertainty`."""
        if not self.config.switches.uncertainty:
            return torch.zeros_like(c_noise)
        return self.logvar_linear(self.logvar_fourier(c_noise))


def module(config: NetworkConfig, block: Block) -> nn.Module:
    return Layer(config, block.name) if block.role == "conv" else UNetBlock(config, block)


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
