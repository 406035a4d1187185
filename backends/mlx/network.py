"""The EDM2 network as MLX modules that walk the plan, in MLX's own layout: images NHWC, weights [out, kh, kw, in].

Parameters have the canonical names. A call is pure: no weight is written and randomness comes from a key that is
given, so ``mx.grad``, ``mx.jvp`` and ``mx.compile`` see a plain function; forced weight normalization belongs to the
step. Fourier constants are frozen parameters. Activations run in ``dtype``; the noise-conditioned path, weights and
norms in float32.

Constants of magnitude-preserving functions (1/0.596 of mp_silu, the blend of mp_sum) ride on the gain of the next or
last convolution, where they cost nothing, instead of on the activations, where each is a pass over memory.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from math import sqrt
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from edm2_core import ladder, mp
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import precondition
from edm2_core.network import GROUP_NORM_EPS

from .convolution import convolve

Keys = Iterator[mx.array | None]


def normalize(x: mx.array, axes: tuple[int, ...], *, eps: float = 1e-4) -> mx.array:
    """Scale to unit root mean square over ``axes``, norms in float32. See :func:`edm2_core.mp.normalize`."""
    # a norm's derivative at 0 is what it is for all small x: that of x / eps
    square = mx.mean(mx.square(x.astype(mx.float32)), axis=axes, keepdims=True)
    zero = square == 0
    norm = mx.where(zero, 0, mx.sqrt(mx.where(zero, 1, square)))
    return x * (1 / (norm + eps)).astype(x.dtype)


def fan_axes(weight: mx.array) -> tuple[int, ...]:
    """All axes of a weight but that of its outputs, the first."""
    return tuple(range(1, weight.ndim))


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


class Fourier(nn.Module):
    """Features of a number, [N] to [N, channels]. See :func:`edm2_core.reference.fourier`."""

    def __init__(self, config: NetworkConfig, channels: int):
        super().__init__()
        self.scale = config.fourier_scale
        self.freqs = mx.zeros(channels)
        self.phases = mx.zeros(channels)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return mx.cos(x[:, None] * self.freqs + self.phases) * self.scale


class Layer(nn.Module):
    """A convolution, or a linear layer where the weight has two axes. See :func:`edm2_core.reference.layer`."""

    def __init__(self, config: NetworkConfig, name: str):
        super().__init__()
        table, self.normalized = plan(config).parameters, config.switches.weight_norm
        weight = table[f"{name}.weight"]
        self.scale, self.forced = config.weight_scale(weight.fan_in), weight.normalized
        out, *inputs = weight.shape
        self.weight = mx.zeros((out, *inputs[1:], inputs[0]))
        if f"{name}.bias" in table:
            self.bias = mx.zeros(out)
        self.watch: Callable[[mx.array], None] | None = None  # is shown what the layer puts out

    def effective_weight(self, gain: float | mx.array = 1.0, *, factor: float = 1.0) -> mx.array:
        w = normalize(self.weight, fan_axes(self.weight)) if self.normalized else self.weight
        return w * (gain * (self.scale * factor))

    def __call__(self, x: mx.array, gain: float | mx.array = 1.0, *, factor: float = 1.0) -> mx.array:
        """``gain`` is the weight's; ``factor`` that of the whole, bias included."""
        w = self.effective_weight(gain, factor=factor).astype(x.dtype)
        y = x @ w.T if w.ndim == 2 else convolve(x, w)
        if "bias" in self:
            y = y + (self.bias * factor).astype(x.dtype)
        return self.seen(y, factor=factor)

    def seen(self, y: mx.array, *, factor: float = 1.0) -> mx.array:
        if self.watch is not None:
            self.watch(y / (factor or 1.0))
        return y


class GroupNorm(nn.Module):
    """See :func:`edm2_core.reference.group_norm`; without groups, nothing."""

    def __init__(self, config: NetworkConfig, name: str, channels: int):
        super().__init__()
        self.kind, self.groups = config.switches.group_norm, config.groups(channels)
        if f"{name}.scale" in plan(config).parameters:
            self.scale, self.bias = mx.zeros(channels), mx.zeros(channels)

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind is ladder.GroupNorm.NONE:
            return x
        grouped, axes = x.reshape(*x.shape[:3], self.groups, -1), (1, 2, 4)
        if self.kind is ladder.GroupNorm.PLAIN:
            return normalize(grouped, axes).reshape(x.shape)
        wide = grouped.astype(mx.float32)
        wide = wide - wide.mean(axis=axes, keepdims=True)
        wide = wide * mx.rsqrt(wide.square().mean(axis=axes, keepdims=True) + GROUP_NORM_EPS)
        return (wide.reshape(x.shape) * self.scale + self.bias).astype(x.dtype)


class UNetBlock(nn.Module):
    """One encoder or decoder block. See :func:`edm2_core.reference.run_block`."""

    def __init__(self, config: NetworkConfig, block: Block):
        super().__init__()
        self.config, self.block = config, block
        name, has = block.name, config.switches
        if has.gains:
            self.emb_gain = mx.zeros(())
        self.norm_res0 = GroupNorm(config, f"{name}.norm_res0", block.residual_channels)
        self.conv_res0 = Layer(config, f"{name}.conv_res0")
        self.emb_linear = Layer(config, f"{name}.emb_linear")
        self.norm_res1 = GroupNorm(config, f"{name}.norm_res1", block.out_channels)
        self.conv_res1 = Layer(config, f"{name}.conv_res1")
        if block.has_conv_skip:
            self.conv_skip = Layer(config, f"{name}.conv_skip")
        if block.heads:
            if has.attention is ladder.Attention.DOT:
                self.norm_attn = GroupNorm(config, f"{name}.norm_attn", block.out_channels)
            self.attn_qkv = Layer(config, f"{name}.attn_qkv")
            self.attn_proj = Layer(config, f"{name}.attn_proj")

    def __call__(self, x: mx.array, emb: mx.array, key: mx.array | None) -> mx.array:
        config, block, has = self.config, self.block, self.config.switches
        x = self.widened(self.resampled(x, now=has.resample_first), now=block.widens_first)
        if block.role == "enc" and has.pixel_norm:
            x = normalize(x, (-1,))
        y = self.resampled(silu(self.norm_res0(x)), now=not has.resample_first)
        y = self.norm_res1(self.conv_res0(y, gain=1 / config.silu_rms))
        y = silu(self.conditioned(y, emb))
        if key is not None:
            y = y * mx.random.bernoulli(1 - config.dropout, y.shape, key).astype(y.dtype) / (1 - config.dropout)
        keep, add = config.blend(config.res_balance)
        y = self.conv_res1(y, gain=1 / config.silu_rms, factor=add)
        x = self.widened(self.resampled(x, now=not has.resample_first), now=not block.widens_first)
        x = x * keep + y
        if block.heads:
            keep, add = config.blend(config.attn_balance)
            x = x * keep + self.attention(x, factor=add)
        return x if config.clip_act is None else mx.clip(x, -config.clip_act, config.clip_act)

    def resampled(self, x: mx.array, *, now: bool) -> mx.array:
        return resample(x, self.block.resample, self.config.resample_filter) if now else x

    def widened(self, x: mx.array, *, now: bool) -> mx.array:
        return self.conv_skip(x) if self.block.has_conv_skip and now else x

    def conditioned(self, y: mx.array, emb: mx.array) -> mx.array:
        """See :func:`edm2_core.reference.conditioning`."""
        has = self.config.switches
        z = self.emb_linear(emb, gain=self.emb_gain if has.gains else 1.0)[:, None, None]
        if not has.shift:
            return y * (z + 1).astype(y.dtype)
        scale, shift = z.split(2, axis=-1)
        return y * (scale + 1).astype(y.dtype) + shift.astype(y.dtype)

    def attention(self, x: mx.array, *, factor: float) -> mx.array:
        """Self-attention over pixels. See :func:`edm2_core.reference.attention`."""
        n, h, w, c = x.shape
        heads, size, layer = self.block.heads, c // self.block.heads, self.attn_qkv
        cosine = self.config.switches.attention is ladder.Attention.COSINE

        def regrouped(rows: mx.array) -> mx.array:
            """Stored [heads, channels per head, (q, k, v)]; so that q, k and v each lie together in memory."""
            return rows.reshape(heads, size, 3, -1).transpose(2, 0, 1, 3).reshape(rows.shape).astype(x.dtype)

        qkv = convolve(x if cosine else self.norm_attn(x), regrouped(layer.effective_weight()))
        qkv = layer.seen(qkv + regrouped(layer.bias) if "bias" in layer else qkv)
        qkv = qkv.reshape(n, h * w, 3, heads, size)
        # dot products of what is not normalized may be of any size
        qkv = normalize(qkv, (-1,)) if cosine else qkv.astype(mx.float32)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / sqrt(size)).astype(x.dtype)
        return self.attn_proj(y.transpose(0, 2, 1, 3).reshape(n, h, w, c), factor=factor)


class UNet(nn.Module):
    """The raw network F. See :func:`edm2_core.reference.unet`."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, walk, has = config, plan(config), config.switches
        self.emb_fourier = Fourier(config, config.noise_channels)
        self.emb_noise = Layer(config, "unet.emb_noise")
        if has.embedding_layers == 2:
            self.emb_noise1 = Layer(config, "unet.emb_noise1")
        if config.label_dim:
            self.emb_label = Layer(config, "unet.emb_label")
        self.enc = {short(block): module(config, block) for block in walk.encoder}
        self.dec = {short(block): module(config, block) for block in walk.decoder}
        if has.output_norm:
            self.out_norm = GroupNorm(config, "unet.out_norm", walk.decoder[-1].out_channels)
        self.out_conv = Layer(config, "unet.out_conv")
        if has.gains:
            self.out_gain = mx.zeros(())

    def __call__(self, x: mx.array, c_noise: mx.array, labels: mx.array | None, keys: Keys) -> mx.array:
        walk, has, emb = plan(self.config), self.config.switches, self.embedding(c_noise, labels)
        if has.ones_channel:
            x = mx.concatenate([x, mx.ones_like(x[..., :1])], axis=-1)
        skips = []
        for block in walk.encoder:
            run = self.enc[short(block)]
            x = run(x) if block.role == "conv" else run(x, emb, next(keys))
            skips.append(x)
        for block in walk.decoder:
            x = self.join(x, skips.pop()) if block.takes_skip else x
            x = self.dec[short(block)](x, emb, next(keys))
        gain = self.out_gain if has.gains else 1.0
        if has.output_norm:
            x, gain = silu(self.out_norm(x)), gain / self.config.silu_rms
        return self.out_conv(x, gain=gain)

    def embedding(self, c_noise: mx.array, labels: mx.array | None) -> mx.array:
        config, has = self.config, self.config.switches
        keep, add = config.blend(config.label_balance) if config.label_dim else (1.0, 1.0)
        emb = self.emb_fourier(c_noise)
        if has.embedding_layers == 2:
            emb = self.emb_noise1(silu(self.emb_noise(emb)), gain=1 / config.silu_rms, factor=keep)
        else:
            emb = self.emb_noise(emb, factor=keep)
        if config.label_dim and labels is not None:
            scale = sqrt(config.label_dim) if has.label_scaling else 1.0
            emb = emb + self.emb_label(labels, gain=add * scale)
        return silu(emb) / config.silu_rms

    def join(self, x: mx.array, skip: mx.array) -> mx.array:
        """See :func:`edm2_core.reference.joined`."""
        keep, add = self.config.concat_blend(x.shape[-1], skip.shape[-1])
        return mx.concatenate([x, skip] if keep == add == 1 else [x * keep, skip * add], axis=-1)


class Network(nn.Module):
    """The denoiser D and its uncertainty u. See :func:`edm2_core.reference.denoise`.

    Args:
        config: what the plan is made of.
        dtype: of activations: float32, bfloat16 or float16.
    """

    def __init__(self, config: NetworkConfig, *, dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.unet = UNet(config)
        if config.switches.uncertainty:
            self.logvar_fourier = Fourier(config, config.logvar_channels)
            self.logvar_linear = Layer(config, "logvar_linear")

    def __call__(
        self, x: mx.array, sigma: mx.array, labels: mx.array | None = None, *, dropout: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """float32 x [N, H, W, C], sigma [N, 1, 1, 1] and labels [N, label_dim] or None to denoised and logvar.

        ``dropout``: a key, in training; None: none.
        """
        c = precondition(sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.reshape(-1)
        output = self.unet((x * c.c_in).astype(self.dtype), c_noise, labels, self.block_keys(dropout)).astype(x.dtype)
        return c.c_skip * x + c.c_out * output, self.uncertainty(c_noise).reshape(-1, 1, 1, 1)

    def uncertainty(self, c_noise: mx.array) -> mx.array:
        """See :func:`edm2_core.reference.uncertainty`."""
        if not self.config.switches.uncertainty:
            return mx.zeros_like(c_noise)
        return self.logvar_linear(self.logvar_fourier(c_noise))

    def block_keys(self, dropout: mx.array | None) -> Keys:
        """A key for each block in running order, or None."""
        if dropout is None or not self.config.dropout:
            return repeat(None)
        walk = plan(self.config)
        return iter(mx.random.split(dropout, len(walk.encoder) + len(walk.decoder)))


def module(config: NetworkConfig, block: Block) -> nn.Module:
    return Layer(config, block.name) if block.role == "conv" else UNetBlock(config, block)


def short(block: Block) -> str:
    return block.name.rpartition(".")[2]


def resample(x: mx.array, mode: str, taps: tuple[float, ...]) -> mx.array:
    """See :func:`edm2_core.mp.resample`; here on NHWC."""
    if mode == "keep":
        return x
    if len(taps) == 2 and taps[0] == taps[1]:
        n, h, w, c = x.shape
        if mode == "down":
            return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
    return mp.resample(x.transpose(0, 3, 1, 2), mode=cast(Any, mode), filter=taps).transpose(0, 2, 3, 1)
