"""The EDM2 network as MLX modules that walk the plan, in MLX's own layout: images NHWC, weights [out, kh, kw, in].

Parameters have the canonical names. A call is pure: no weight is written and randomness comes from a key that is
given, so ``mx.grad``, ``mx.jvp`` and ``mx.compile`` see a plain function; forced weight normalization belongs to the
step. Fourier constants are frozen parameters. Activations run in ``dtype``; the noise-conditioned path, weights and
norms in float32.

Constants of magnitude-preserving functions (1/0.596 of mp_silu, the blend of mp_sum) ride on the gain of the next or
last convolution, where they cost nothing, instead of on the activations, where each is a pass over memory.
"""

from collections.abc import Iterator
from itertools import repeat
from math import prod, sqrt
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from edm2_core import mp
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import precondition

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


def blend(t: float) -> tuple[float, float]:
    """Factors of a and b in mp_sum(a, b, t)."""
    scale = 1 / sqrt((1 - t) ** 2 + t**2)
    return (1 - t) * scale, t * scale


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


class Fourier(nn.Module):
    """sqrt(2) cos(freqs x + phases), [N] to [N, channels]. See :func:`edm2_core.mp.mp_fourier`."""

    def __init__(self, channels: int):
        super().__init__()
        self.freqs = mx.zeros(channels)
        self.phases = mx.zeros(channels)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return mp.mp_fourier(x, self.freqs, self.phases)


class Layer(nn.Module):
    """A convolution, or a linear layer where the weight has two axes, with magnitude-preserving weight."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = mx.zeros(shape)

    def effective_weight(self, gain: float | mx.array = 1.0) -> mx.array:
        """See :func:`edm2_core.mp.mp_weight`."""
        return normalize(self.weight, fan_axes(self.weight)) * (gain * (1 / sqrt(prod(self.weight.shape[1:]))))

    def __call__(self, x: mx.array, gain: float | mx.array = 1.0) -> mx.array:
        w = self.effective_weight(gain).astype(x.dtype)
        return x @ w.T if w.ndim == 2 else convolve(x, w)


class UNetBlock(nn.Module):
    """One encoder or decoder block of Figure 22. See :func:`edm2_core.reference.run_block`."""

    def __init__(self, config: NetworkConfig, block: Block):
        super().__init__()
        self.config, self.block = config, block
        channels = block.out_channels
        self.emb_gain = mx.zeros(())
        self.conv_res0 = Layer(channels, 3, 3, block.residual_channels)
        self.emb_linear = Layer(channels, config.emb_channels)
        self.conv_res1 = Layer(channels, 3, 3, channels)
        if block.has_conv_skip:
            self.conv_skip = Layer(channels, 1, 1, block.in_channels)
        if block.heads:
            self.attn_qkv = Layer(3 * channels, 1, 1, channels)
            self.attn_proj = Layer(channels, 1, 1, channels)

    def __call__(self, x: mx.array, emb: mx.array, key: mx.array | None) -> mx.array:
        config, block = self.config, self.block
        x = resample(x, block.resample, config.resample_filter)
        if block.role == "enc":
            x = normalize(self.conv_skip(x) if block.has_conv_skip else x, (-1,))
        keep, add = blend(config.res_balance)
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res0(silu(x), gain=1 / mp.SILU_RMS)
        y = silu(y * scale[:, None, None].astype(y.dtype))
        if key is not None:
            y = y * mx.random.bernoulli(1 - config.dropout, y.shape, key).astype(y.dtype) / (1 - config.dropout)
        y = self.conv_res1(y, gain=add / mp.SILU_RMS)
        if block.role == "dec" and block.has_conv_skip:
            x = self.conv_skip(x)
        x = x * keep + y
        if block.heads:
            keep, add = blend(config.attn_balance)
            x = x * keep + self.attention(x, gain=add)
        return x if config.clip_act is None else mx.clip(x, -config.clip_act, config.clip_act)

    def attention(self, x: mx.array, *, gain: float) -> mx.array:
        """Cosine self-attention over pixels. See :func:`edm2_core.reference.attention`."""
        n, h, w, c = x.shape
        heads, size = self.block.heads, c // self.block.heads
        weight = self.attn_qkv.effective_weight().astype(x.dtype)
        # stored [heads, channels per head, (q, k, v)]; regrouped so that q, k and v each lie together in memory
        weight = weight.reshape(heads, size, 3, c).transpose(2, 0, 1, 3).reshape(3 * c, 1, 1, c)
        qkv = normalize(convolve(x, weight).reshape(n, h * w, 3, heads, size), (-1,))
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / sqrt(size))
        return self.attn_proj(y.transpose(0, 2, 1, 3).reshape(n, h, w, c), gain=gain)


class UNet(nn.Module):
    """The raw network F. See :func:`edm2_core.reference.unet`."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, walk = config, plan(config)
        self.emb_fourier = Fourier(config.noise_channels)
        self.emb_noise = Layer(config.emb_channels, config.noise_channels)
        if config.label_dim:
            self.emb_label = Layer(config.emb_channels, config.label_dim)
        self.enc = {short(block): module(config, block) for block in walk.encoder}
        self.dec = {short(block): module(config, block) for block in walk.decoder}
        self.out_conv = Layer(config.img_channels, 3, 3, walk.decoder[-1].out_channels)
        self.out_gain = mx.zeros(())

    def __call__(self, x: mx.array, c_noise: mx.array, labels: mx.array | None, keys: Keys) -> mx.array:
        walk, emb = plan(self.config), self.embedding(c_noise, labels)
        x = mx.concatenate([x, mx.ones_like(x[..., :1])], axis=-1)
        skips = []
        for block in walk.encoder:
            run = self.enc[short(block)]
            x = run(x) if block.role == "conv" else run(x, emb, next(keys))
            skips.append(x)
        for block in walk.decoder:
            x = mp.mp_cat(x, skips.pop(), axis=-1, t=self.config.concat_balance) if block.takes_skip else x
            x = self.dec[short(block)](x, emb, next(keys))
        return self.out_conv(x, gain=self.out_gain)

    def embedding(self, c_noise: mx.array, labels: mx.array | None) -> mx.array:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.config.label_dim:
            keep, add = blend(self.config.label_balance)
            emb = emb * keep
            if labels is not None:
                emb = emb + self.emb_label(labels, gain=add * sqrt(self.config.label_dim))
        return silu(emb) / mp.SILU_RMS


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
        self.logvar_fourier = Fourier(config.logvar_channels)
        self.logvar_linear = Layer(1, config.logvar_channels)

    def __call__(
        self, x: mx.array, sigma: mx.array, labels: mx.array | None = None, *, dropout: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """float32 x [N, H, W, C], sigma [N, 1, 1, 1] and labels [N, label_dim] or None to denoised and logvar.

        ``dropout``: a key, in training; None: none.
        """
        c = precondition(sigma, sigma_data=self.config.sigma_data)
        c_noise = c.c_noise.reshape(-1)
        output = self.unet((x * c.c_in).astype(self.dtype), c_noise, labels, self.block_keys(dropout)).astype(x.dtype)
        logvar = self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return c.c_skip * x + c.c_out * output, logvar

    def block_keys(self, dropout: mx.array | None) -> Keys:
        """A key for each block in running order, or None."""
        if dropout is None or not self.config.dropout:
            return repeat(None)
        walk = plan(self.config)
        return iter(mx.random.split(dropout, len(walk.encoder) + len(walk.decoder)))


def module(config: NetworkConfig, block: Block) -> nn.Module:
    return Layer(block.out_channels, 3, 3, block.in_channels) if block.role == "conv" else UNetBlock(config, block)


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
