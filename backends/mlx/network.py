"""The EDM2 network as MLX modules built from the plan, in MLX's own layout: images NHWC, weights [out, kh, kw, in].

Parameters have the canonical names. A call is pure: it writes no weight, and dropout draws from the key that is given,
so ``mx.grad``, ``mx.jvp`` and ``mx.compile`` apply. Forced weight normalization belongs to the training step. Fourier
constants are frozen parameters. Activations are computed in ``dtype``; the noise-conditioned path, weights and norms in
float32.

The constant factors of magnitude-preserving functions (1/0.596 of mp_silu, the blend of mp_sum) are multiplied into the
weights of the next or last convolution, so that they cost no pass over the activations.
"""

from collections.abc import Iterator
from itertools import repeat
from math import pi, sqrt
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from edm2_core import ladder, mp
from edm2_core.network import GROUP_NORM_EPS, Block, NetworkConfig, Parameter, plan

from .convolution import convolve
from .denoiser import Denoiser

Keys = Iterator[mx.array | None]


# ---- layers


def initial(parameter: Parameter, /) -> mx.array:
    """An initial value in the native layout, float32, drawn from MLX's global key.

    The distributions are those of :func:`edm2_core.network.initialize`, the numbers are others.
    """
    shape, bound = parameter.shape, sqrt(6 / parameter.fan_in)
    if len(shape) == 4:
        shape = (shape[0], *shape[2:], shape[1])
    size = shape[0] if shape else 0
    half = (size + 1) // 2
    match parameter.init:
        case "normal":
            draw = nn.init.normal()
        case "he":
            draw = nn.init.uniform(-bound, bound)
        case "zeros" | "ones":
            draw = nn.init.constant(float(parameter.init == "ones"))
        case "frequencies":
            draw = nn.init.normal(std=2 * pi)
        case "phases":
            draw = nn.init.uniform(0, 2 * pi)
        case "positions":
            return mx.power(10000.0, -(mx.arange(size) % half) / half)
        case "quadratures":
            return mx.where(mx.arange(size) < half, 0.0, -pi / 2)
    value: mx.array = draw(mx.zeros(shape))
    return value


def normalize(x: mx.array, axes: tuple[int, ...], *, eps: float = 1e-4) -> mx.array:
    """Scale to unit root mean square over ``axes``, norms in float32. See :func:`edm2_core.mp.normalize`.

    The derivative at 0 is that of x / eps, as for all small x, where sqrt alone would give nan.
    """
    square = mx.mean(mx.square(x.astype(mx.float32)), axis=axes, keepdims=True)
    zero = square == 0
    norm = mx.where(zero, 0, mx.sqrt(mx.where(zero, 1, square)))
    return x * (1 / (norm + eps)).astype(x.dtype)


def fan_axes(weight: mx.array) -> tuple[int, ...]:
    """All axes of a weight but that of its outputs, the first."""
    return tuple(range(1, weight.ndim))


class Fourier(nn.Module):
    """Features of a number, [N] to [N, channels]. See :func:`edm2_core.reference.fourier`."""

    def __init__(self, config: NetworkConfig, name: str):
        super().__init__()
        table, self.scale = plan(config).parameters, config.fourier_scale
        self.freqs, self.phases = initial(table[f"{name}.freqs"]), initial(table[f"{name}.phases"])
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
        self.weight = initial(weight)
        self.folds = False
        self._folded: mx.array | None = None
        if f"{name}.bias" in table:
            self.bias = initial(table[f"{name}.bias"])

    def __call__(self, x: mx.array, gain: float | mx.array = 1.0, *, factor: float = 1.0) -> mx.array:
        """[N, in] to [N, out], or [N, H, W, in] to [N, H, W, out]. ``gain`` multiplies the weight, ``factor`` the
        output, bias included."""
        w = self._folded
        if w is None:
            w = normalize(self.weight, fan_axes(self.weight)) if self.normalized else self.weight
            w = self.rows(w * (gain * (self.scale * factor))).astype(x.dtype)
            self._folded = w if self.folds else None
        y = x @ w.T if w.ndim == 2 else convolve(x, w)
        return y + self.rows(self.bias * factor).astype(x.dtype) if "bias" in self else y

    def rows(self, stored: mx.array) -> mx.array:
        """A weight or bias, [out, ...], in the order of the layer's outputs."""
        return stored


class QKV(Layer):
    """The convolution before attention. Its outputs are stored as [heads, channels per head, (q, k, v)] and returned
    as [(q, k, v), heads, channels per head], so that each of q, k and v is contiguous."""

    def __init__(self, config: NetworkConfig, name: str, *, heads: int):
        super().__init__(config, name)
        self.heads = heads

    def rows(self, stored: mx.array) -> mx.array:
        channels = len(stored) // (3 * self.heads)
        return stored.reshape(self.heads, channels, 3, -1).transpose(2, 0, 1, 3).reshape(stored.shape)


class GroupNorm(nn.Module):
    """See :func:`edm2_core.reference.group_norm`; the identity on rungs without it."""

    def __init__(self, config: NetworkConfig, name: str, channels: int):
        super().__init__()
        table, self.kind, self.groups = plan(config).parameters, config.switches.group_norm, config.groups(channels)
        if f"{name}.scale" in table:
            self.scale, self.bias = initial(table[f"{name}.scale"]), initial(table[f"{name}.bias"])

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind is ladder.GroupNorm.NONE:
            return x
        grouped, axes = x.reshape(*x.shape[:3], self.groups, -1), (1, 2, 4)  # (N, H, W, groups, C / groups)
        if self.kind is ladder.GroupNorm.PLAIN:
            return normalize(grouped, axes).reshape(x.shape)
        wide = grouped.astype(mx.float32)
        wide = wide - wide.mean(axis=axes, keepdims=True)
        wide = wide * mx.rsqrt(wide.square().mean(axis=axes, keepdims=True) + GROUP_NORM_EPS)
        return (wide.reshape(x.shape) * self.scale + self.bias).astype(x.dtype)


# ---- the U-Net


class UNetBlock(nn.Module):
    """One encoder or decoder block. See :func:`edm2_core.reference.run_block`."""

    def __init__(self, config: NetworkConfig, block: Block):
        super().__init__()
        self.config, self.block = config, block
        name, has = block.name, config.switches
        if has.gains:
            self.emb_gain = initial(plan(config).parameters[f"{name}.emb_gain"])
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
            self.attn_qkv = QKV(config, f"{name}.attn_qkv", heads=block.heads)
            self.attn_proj = Layer(config, f"{name}.attn_proj")

    def __call__(self, x: mx.array, emb: mx.array, key: mx.array | None) -> mx.array:
        """x [N, H, W, C] and emb [N, emb_channels] to [N, H', W', C']; ``key``: those of its dropout, or None."""
        config, block, has = self.config, self.block, self.config.switches
        x = self.widened(self.resampled(x, now=has.resample_first), now=block.widens_first)
        if block.role == "enc" and has.pixel_norm:
            x = normalize(x, (-1,))
        y = self.resampled(nn.silu(self.norm_res0(x)), now=not has.resample_first)
        y = self.norm_res1(self.conv_res0(y, gain=1 / config.silu_rms))
        y = nn.silu(self.conditioned(y, emb))
        if key is not None:
            y = y * kept(key, y, 1 - config.dropout).astype(y.dtype) / (1 - config.dropout)
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
        z = self.emb_linear(emb, gain=self.emb_gain if has.gains else 1.0)[:, None, None]  # (N, 1, 1, C or 2 C)
        if not has.shift:
            return y * (z + 1).astype(y.dtype)
        scale, shift = z.split(2, axis=-1)
        return y * (scale + 1).astype(y.dtype) + shift.astype(y.dtype)

    def attention(self, x: mx.array, *, factor: float) -> mx.array:
        """Self-attention over pixels. See :func:`edm2_core.reference.attention`."""
        n, h, w, c = x.shape
        heads, size = self.block.heads, c // self.block.heads
        cosine = self.config.switches.attention is ladder.Attention.COSINE
        qkv = self.attn_qkv(x if cosine else self.norm_attn(x)).reshape(n, h * w, 3, heads, size)
        # dot products of unnormalized queries and keys are unbounded: float32
        qkv = normalize(qkv, (-1,)) if cosine else qkv.astype(mx.float32)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (N, heads, H W, size)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / sqrt(size)).astype(x.dtype)
        return self.attn_proj(y.transpose(0, 2, 1, 3).reshape(n, h, w, c), factor=factor)


class UNet(nn.Module):
    """EDM2's backbone. See :func:`edm2_core.reference.unet`."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, walk, has = config, plan(config), config.switches
        self.recomputes = False
        self.emb_fourier = Fourier(config, "unet.emb_fourier")
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
            self.out_gain = initial(walk.parameters["unet.out_gain"])

    def __call__(
        self, x: mx.array, c_noise: mx.array, labels: mx.array | None = None, *, dropout: mx.array | None = None
    ) -> mx.array:
        """x [N, H, W, C + cond_channels], already scaled, c_noise [N] and labels [N, label_dim] or None to
        [N, H, W, C]; ``dropout``: keys [N, 2], one an image, or None."""
        walk, has = plan(self.config), self.config.switches
        emb, keys = self.embedding(c_noise, labels), self.block_keys(dropout)
        (above, below), (left, right) = self.config.padding
        if above or below or left or right:
            x = mx.pad(x, [(0, 0), (above, below), (left, right), (0, 0)])
        if has.ones_channel:
            x = mx.concatenate([x, mx.ones_like(x[..., :1])], axis=-1)  # (N, H, W, in_channels)
        skips = []
        for block in walk.encoder:
            run = self.enc[short(block)]
            x = run(x) if block.role == "conv" else self.run(run, x, emb, next(keys))
            skips.append(x)
        for block in walk.decoder:
            x = self.join(x, skips.pop()) if block.takes_skip else x
            x = self.run(self.dec[short(block)], x, emb, next(keys))
        gain = self.out_gain if has.gains else 1.0
        if has.output_norm:
            x, gain = nn.silu(self.out_norm(x)), gain / self.config.silu_rms
        x, (height, width) = self.out_conv(x, gain=gain), self.config.image_size
        return x[:, above : above + height, left : left + width]

    def run(self, block: nn.Module, x: mx.array, emb: mx.array, key: mx.array | None) -> mx.array:
        """A block; with ``recomputes``, only its input is kept for the backward pass."""
        if not self.recomputes:
            return block(x, emb, key)
        return nn.utils.checkpoint(block, lambda x, emb: block(x, emb, key))(x, emb)

    def block_keys(self, dropout: mx.array | None) -> Keys:
        """The dropout keys for each block in running order, [N, 2], or None."""
        if dropout is None or not self.config.dropout:
            return repeat(None)
        walk = plan(self.config)
        blocks = len(walk.encoder) + len(walk.decoder)
        keys = mx.vmap(lambda key: mx.random.split(key, blocks))(dropout)  # (N, blocks, 2)
        return iter(keys.swapaxes(0, 1))

    def embedding(self, c_noise: mx.array, labels: mx.array | None) -> mx.array:
        """The conditioning vector, [N, emb_channels]."""
        config, has = self.config, self.config.switches
        keep, add = config.blend(config.label_balance) if config.label_dim else (1.0, 1.0)
        emb = self.emb_fourier(c_noise)  # (N, noise_channels)
        if has.embedding_layers == 2:
            emb = self.emb_noise1(nn.silu(self.emb_noise(emb)), gain=1 / config.silu_rms, factor=keep)
        else:
            emb = self.emb_noise(emb, factor=keep)
        if config.label_dim and labels is not None:
            scale = sqrt(config.label_dim) if has.label_scaling else 1.0
            emb = emb + self.emb_label(labels, gain=add * scale)
        return nn.silu(emb) / config.silu_rms

    def join(self, x: mx.array, skip: mx.array) -> mx.array:
        """See :func:`edm2_core.reference.joined`."""
        keep, add = self.config.concat_blend(x.shape[-1], skip.shape[-1])
        return mx.concatenate([x, skip] if keep == add == 1 else [x * keep, skip * add], axis=-1)


def module(config: NetworkConfig, block: Block) -> nn.Module:
    return Layer(config, block.name) if block.role == "conv" else UNetBlock(config, block)


def short(block: Block) -> str:
    return block.name.rpartition(".")[2]


def resample(x: mx.array, mode: str, taps: tuple[float, ...]) -> mx.array:
    """:func:`edm2_core.mp.resample` on NHWC."""
    if mode == "keep":
        return x
    if len(taps) == 2 and taps[0] == taps[1]:
        n, h, w, c = x.shape
        if mode == "down":
            return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
    return mp.resample(x.transpose(0, 3, 1, 2), mode=cast(Any, mode), filter=taps).transpose(0, 2, 3, 1)


# ---- the denoiser


class Network(Denoiser):
    """The EDM2 denoiser, ready to train: parameters are drawn from MLX's global key. See
    :func:`edm2_core.reference.denoise`; ``dropout`` of a call acts where ``config.dropout`` is not 0.

    Args:
        config: sizes and switches.
        dtype: of activations: float32, bfloat16 or float16.
    """

    def __init__(self, config: NetworkConfig, *, dtype: mx.Dtype = mx.float32):
        super().__init__(
            UNet(config),
            sigma_data=config.sigma_data,
            label_dim=config.label_dim,
            cond_channels=config.cond_channels,
            label_dropout=config.label_dropout,
            dtype=dtype,
        )
        self.config = config
        self.unet = self.pop("backbone")  # the canonical name
        if config.switches.uncertainty:
            self.logvar_fourier = Fourier(config, "logvar_fourier")
            self.logvar_linear = Layer(config, "logvar_linear")

    def raw(self, x: mx.array, c_noise: mx.array, labels: mx.array | None, **dropout: mx.array) -> mx.array:
        return self.unet(x, c_noise, labels, **dropout)

    def logvar(self, c_noise: mx.array) -> mx.array:
        """See :func:`edm2_core.reference.uncertainty`."""
        if not self.config.switches.uncertainty:
            return mx.zeros_like(c_noise)
        return self.logvar_linear(self.logvar_fourier(c_noise))  # (N,) -> (N, logvar_channels) -> (N, 1)


def kept(keys: mx.array, like: mx.array, share: float) -> mx.array:
    """Booleans like ``like`` [N, ...], of which this ``share`` is true; those of an image by its key alone. Shapes:
    keys [N, 2]."""
    drawn: mx.array = mx.vmap(lambda key: mx.random.bernoulli(share, like.shape[1:], key))(keys)
    return drawn


def fold(network: Network) -> None:
    """Compute the normalized weights, with their gains, once and for all: for a network that is only sampled from.

    Gains and factors are the same in every call without dropout, so those of one call are kept.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Layer)]
    config = network.config
    for layer in layers:
        layer.folds = True
    x, condition = (
        mx.zeros((1, *config.image_size, channels)) for channels in (config.img_channels, config.cond_channels)
    )
    labels = mx.zeros((1, config.label_dim)) if config.label_dim else None
    mx.eval(network(x, mx.ones((1, 1, 1, 1)), labels, condition if config.cond_channels else None))
    for layer in layers:
        layer.folds = False
        if layer._folded is not None:
            mx.eval(layer._folded)
