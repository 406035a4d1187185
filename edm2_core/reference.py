"""The whole network over the array API, written for clarity: on float64 NumPy arrays it is the reference of every port.

It follows the plan of :mod:`edm2_core.network`, with the switches of the config's rung. Each layer is a function of
:mod:`edm2_core.mp`, or what the paper had before it. Nothing writes in place, so libraries with automatic
differentiation can differentiate it. Dropout, which acts in training only, is left out. ``params`` are arrays by
canonical name, with the shapes of ``plan(config).parameters``; every result has the library and dtype of ``x``.

Source: arXiv 2312.02696 Figures 16 to 22. Departs from the paper: where a function says so, and see docs/departures.md.
"""

import operator
from collections.abc import Mapping
from functools import reduce
from math import prod, sqrt
from typing import cast

from . import loss as objective
from . import precond
from .arrays import A, Array, namespace
from .ladder import Attention, GroupNorm
from .mp import mp_cat, mp_fourier, mp_silu, mp_sum, mp_weight, normalize, resample
from .mp import silu as plain_silu
from .network import GROUP_NORM_EPS, Block, NetworkConfig, plan

Params = Mapping[str, Array]


def denoise(
    config: NetworkConfig,
    params: Params,
    x: A,
    sigma: A,
    labels: Array | None = None,
    condition: Array | None = None,
    /,
) -> tuple[A, A]:
    """Denoise images at any noise levels.

    Args:
        config: the network.
        params: its parameters, as :func:`~edm2_core.network.initialize` makes them.
        x: noisy images, [N, C, H, W].
        sigma: their noise levels, [N, 1, 1, 1].
        labels: one-hot rows or label vectors, [N, label_dim], zeros for an image without label (SPEC LOSS-4, NET-8);
            None: no image has one.
        condition: [N, cond_channels, H, W], in the units of the images; None for a network without (SPEC NET-11).

    Returns:
        The denoised images [N, C, H, W], and the uncertainty u(sigma) [N, 1, 1, 1], 0 where none is learned.

    Source: Eqs. 4-8, 21.

    >>> import numpy as np
    >>> from edm2_core.network import initialize
    >>> config = NetworkConfig(img_resolution=4, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1,
    ...                        attn_resolutions=(), channels_per_head=4)
    >>> denoised, logvar = denoise(config, initialize(config, seed=0), np.ones((2, 1, 4, 4)), np.ones((2, 1, 1, 1)))
    >>> denoised.shape, logvar.shape
    ((2, 1, 4, 4), (2, 1, 1, 1))
    """

    def backbone(scaled: A, c_noise: A) -> A:
        if condition is not None:
            scaled = precond.join_condition(scaled, cast(A, condition), sigma_data=config.sigma_data)
        return cast(A, unet(config, params, scaled, c_noise, labels))

    denoised = precond.denoise(backbone, x, sigma, sigma_data=config.sigma_data)
    c_noise = precond.precondition(sigma, sigma_data=config.sigma_data).c_noise
    return denoised, cast(A, uncertainty(config, params, namespace(x).reshape(c_noise, (-1,))))


def loss(
    config: NetworkConfig,
    params: Params,
    images: A,
    unit_noise: A,
    sigma: A,
    labels: Array | None = None,
    condition: Array | None = None,
    /,
) -> A:
    """The loss of each element of denoising ``images + sigma unit_noise``.

    Shapes: images and unit_noise [N, C, H, W]; sigma [N, 1, 1, 1]; labels [N, label_dim] or None; condition
    [N, cond_channels, H, W] or None; the result [N, C, H, W]. Source: Eqs. 14, 21.
    """
    noisy = cast(A, images + unit_noise * sigma)
    denoised, logvar = denoise(config, params, noisy, sigma, labels, condition)
    return objective.loss(denoised, images, sigma, logvar, sigma_data=config.sigma_data)


def uncertainty(config: NetworkConfig, params: Params, c_noise: Array, /) -> Array:
    """u(sigma) from c_noise: [N] to [N, 1, 1, 1]; 0 where none is learned. Source: Eq. 21 and Appendix B.2."""
    xp = namespace(c_noise)
    if not config.switches.uncertainty:
        return xp.reshape(xp.zeros_like(c_noise), (-1, 1, 1, 1))
    features = fourier(config, params, "logvar_fourier", c_noise)  # [N, logvar_channels]
    return xp.reshape(layer(config, params, "logvar_linear", features), (-1, 1, 1, 1))


def unet(config: NetworkConfig, params: Params, x: Array, c_noise: Array, labels: Array | None, /) -> Array:
    """The raw network F.

    Shapes: x [N, C + cond_channels, H, W], already scaled; c_noise [N]; labels [N, label_dim] or None. Returns
    [N, C, H, W]. Source: Figures 16 to 22. Departs from the paper: padding and conditions (SPEC NET-11).
    """
    xp, walk = namespace(x), plan(config)
    emb = embedding(config, params, c_noise, labels)
    x = padded(x, config.padding)
    if walk.switches.ones_channel:
        x = xp.concat([x, xp.ones_like(x[:, :1, ...])], axis=1)  # (N, in_channels, H, W)
    skips = []
    for block in walk.encoder:
        x = layer(config, params, block.name, x) if block.role == "conv" else run_block(config, block, params, x, emb)
        skips.append(x)
    for block in walk.decoder:
        if block.takes_skip:
            x = joined(config, x, skips.pop())  # (N, block.in_channels, h, w)
        x = run_block(config, block, params, x, emb)
    if walk.switches.output_norm:
        x = silu(config, group_norm(config, params, "unet.out_norm", x))
    x = layer(config, params, "unet.out_conv", x, gain=params["unet.out_gain"] if walk.switches.gains else 1.0)
    (above, _), (left, _) = config.padding
    height, width = config.image_size
    return x[:, :, above : above + height, left : left + width]


def padded(x: Array, padding: tuple[tuple[int, int], tuple[int, int]], /) -> Array:
    """x [N, C, H, W] with rows (above, below) and columns (left, right) of zeros around it."""
    xp = namespace(x)
    for axis, (before, after) in zip((2, 3), padding, strict=True):
        line = xp.zeros_like(x[:, :, :1, :] if axis == 2 else x[:, :, :, :1])  # of the device of x
        x = xp.concat([*[line] * before, x, *[line] * after], axis=axis)
    return x


def embedding(config: NetworkConfig, params: Params, c_noise: Array, labels: Array | None, /) -> Array:
    """The conditioning vector: c_noise [N] and labels [N, label_dim] to [N, emb_channels]; None stands for zeros.

    Source: Figures 16 to 22.
    """
    has = config.switches
    emb = layer(config, params, "unet.emb_noise", fourier(config, params, "unet.emb_fourier", c_noise))
    if has.embedding_layers == 2:
        emb = layer(config, params, "unet.emb_noise1", silu(config, emb))
    if config.label_dim:
        scale = sqrt(config.label_dim) if has.label_scaling else 1.0
        label = emb * 0 if labels is None else layer(config, params, "unet.emb_label", labels * scale)
        emb = summed(config, emb, label, t=config.label_balance)
    return silu(config, emb)


def run_block(config: NetworkConfig, block: Block, params: Params, x: Array, emb: Array, /) -> Array:
    """One encoder or decoder block: x [N, in_channels, h, w] and emb [N, emb_channels] to [N, out_channels, h', w'], at
    the resolution of the block. Source: Figures 16 to 22."""
    name, has = block.name, config.switches

    def resampled(x: Array, *, now: bool) -> Array:
        return resample(x, mode=block.resample, filter=config.resample_filter) if now else x

    def widened(x: Array, *, now: bool) -> Array:
        return layer(config, params, f"{name}.conv_skip", x) if block.has_conv_skip and now else x

    x = widened(resampled(x, now=has.resample_first), now=block.widens_first)
    if block.role == "enc" and has.pixel_norm:
        x = normalize(x, axis=1)
    y = silu(config, group_norm(config, params, f"{name}.norm_res0", x))
    y = layer(config, params, f"{name}.conv_res0", resampled(y, now=not has.resample_first))
    scale, shift = conditioning(config, block, params, emb)
    y = group_norm(config, params, f"{name}.norm_res1", y) * scale + shift
    y = layer(config, params, f"{name}.conv_res1", silu(config, y))
    x = widened(resampled(x, now=not has.resample_first), now=not block.widens_first)
    x = summed(config, x, y, t=config.res_balance)
    if block.heads:
        x = summed(config, x, attention(config, block, params, x), t=config.attn_balance)
    return x if config.clip_act is None else namespace(x).clip(x, -config.clip_act, config.clip_act)


def conditioning(config: NetworkConfig, block: Block, params: Params, emb: Array, /) -> tuple[Array, Array | float]:
    """Scale and shift of the residual branch, each [N, out_channels, 1, 1], from emb [N, emb_channels]; the shift is 0
    where the rung has none. Source: Figures 16 to 22."""
    has, name = config.switches, block.name
    y = layer(config, params, f"{name}.emb_linear", emb, gain=params[f"{name}.emb_gain"] if has.gains else 1.0)
    scale, shift = y[:, : block.out_channels, None, None], y[:, block.out_channels :, None, None]
    return scale + 1, shift if has.shift else 0.0


def attention(config: NetworkConfig, block: Block, params: Params, x: Array, /) -> Array:
    """Self-attention over the pixels of x: [N, C, H, W] to the same, before the sum with x.

    The channels of the 1x1 convolution's output are read as [heads, channels per head, 3 (q, k, v)]. In cosine
    attention, values are normalized as well as queries and keys. Source: Eqs. 10-12, 30-34.
    """
    xp, (n, c, h, w) = namespace(x), x.shape
    cosine = config.switches.attention is Attention.COSINE
    y = x if cosine else group_norm(config, params, f"{block.name}.norm_attn", x)
    qkv = layer(config, params, f"{block.name}.attn_qkv", y)  # (N, 3 C, H, W)
    qkv = xp.reshape(qkv, (n, block.heads, c // block.heads, 3, h * w))
    qkv = normalize(qkv, axis=2) if cosine else qkv
    q, k, v = (qkv[:, :, :, i, :] for i in range(3))  # (N, heads, C / heads, H W)
    logits = xp.matmul(xp.permute_dims(q, (0, 1, 3, 2)), k) * (1 / sqrt(c // block.heads))  # (N, heads, H W, H W)
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    y = xp.matmul(v, xp.permute_dims(weights, (0, 1, 3, 2)))  # (N, heads, C / heads, H W)
    return layer(config, params, f"{block.name}.attn_proj", xp.reshape(y, (n, c, h, w)))


def group_norm(config: NetworkConfig, params: Params, name: str, x: Array, /) -> Array:
    """x [N, C, H, W] normalized over groups of channels and all pixels; x itself where the rung has no group norm.

    Source: Eq. 29 (plain), Appendix B.1 (affine). Departs from the paper: the plain one adds eps to the root mean
    square, as pixel norm does.
    """
    kind = config.switches.group_norm
    if kind is GroupNorm.NONE:
        return x
    xp, (n, c, h, w), groups = namespace(x), x.shape, config.groups(x.shape[1])
    x = xp.reshape(x, (n, groups, c // groups, h, w))
    if kind is GroupNorm.PLAIN:
        return xp.reshape(normalize(x, axis=(2, 3, 4)), (n, c, h, w))
    x = x - xp.mean(x, axis=(2, 3, 4), keepdims=True)
    x = x / xp.sqrt(xp.mean(x * x, axis=(2, 3, 4), keepdims=True) + GROUP_NORM_EPS)
    scale, bias = (xp.reshape(params[f"{name}.{part}"], (1, -1, 1, 1)) for part in ("scale", "bias"))
    return xp.reshape(x, (n, c, h, w)) * scale + bias


def silu(config: NetworkConfig, x: Array, /) -> Array:
    """SiLU, divided by its root mean square where the rung preserves magnitude. Shapes: kept. Source: Eq. 81, or 9."""
    return mp_silu(x) if config.switches.mp_functions else plain_silu(x)


def fourier(config: NetworkConfig, params: Params, name: str, x: Array, /) -> Array:
    """Fourier features: x [N] to [N, channels]. Source: Eq. 75, or 35 without the factor sqrt(2)."""
    return mp_fourier(x, params[f"{name}.freqs"], params[f"{name}.phases"]) * (config.fourier_scale / sqrt(2))


def summed(config: NetworkConfig, a: Array, b: Array, /, *, t: float) -> Array:
    """The sum of two branches of equal shape, ``t`` the share of b. Source: Eq. 88, or a plain sum."""
    return mp_sum(a, b, t=t) if config.switches.mp_functions else a + b


def joined(config: NetworkConfig, x: Array, skip: Array, /) -> Array:
    """x [N, C, h, w] and a skip [N, S, h, w] to [N, C + S, h, w]. Source: Eq. 103, or plain concatenation."""
    if config.switches.mp_functions:
        return mp_cat(x, skip, axis=1, t=config.concat_balance)
    return namespace(x).concat([x, skip], axis=1)


def layer(config: NetworkConfig, params: Params, name: str, x: Array, /, *, gain: float | Array = 1.0) -> Array:
    """The linear layer ([N, in] to [N, out]) or convolution ([N, in, h, w] to [N, out, h, w]) of that name.

    The weight is normalized, or scaled as the rung says; the bias is added where the plan has one. Source: Eq. 47.
    """
    w = params[f"{name}.weight"]
    if config.switches.weight_norm:
        y = (linear if w.ndim == 2 else conv)(x, w, gain=gain)
    else:
        y = products(x, w * (gain * config.weight_scale(prod(w.shape[1:]))))
    if f"{name}.bias" not in plan(config).parameters:
        return y
    return y + namespace(x).reshape(params[f"{name}.bias"], (1, -1, *[1] * (w.ndim - 2)))


def linear(x: A, w: Array, /, *, gain: float | Array = 1.0) -> A:
    """Magnitude-preserving linear layer: x [N, in], w [out, in] to [N, out]. Source: Eq. 46."""
    return products(x, mp_weight(w, gain=gain))


def conv(x: A, w: Array, /, *, gain: float | Array = 1.0) -> A:
    """Magnitude-preserving convolution, zeros beyond the border: x [N, in, H, W], w [out, in, k, k] to [N, out, H, W].
    Source: Eq. 46."""
    return products(x, mp_weight(w, gain=gain))


def products(x: A, w: Array, /) -> A:
    """x [N, in] times w [out, in]; or [N, in, H, W] convolved with w [out, in, k, k], zeros beyond the border."""
    xp = namespace(x)
    if w.ndim == 2:
        return cast(A, xp.matmul(x, xp.permute_dims(w, (1, 0))))
    n, c, height, width = x.shape
    size, pad = w.shape[-1], w.shape[-1] // 2
    surrounded = padded(x, ((pad, pad), (pad, pad)))  # (N, in, H + 2 pad, W + 2 pad)
    shifted = (
        (w[:, :, i, j], xp.reshape(surrounded[:, :, i : i + height, j : j + width], (n, c, height * width)))
        for i in range(size)
        for j in range(size)
    )
    total = reduce(operator.add, (xp.matmul(tap, pixels) for tap, pixels in shifted))  # (N, out, H W)
    return cast(A, xp.reshape(total, (n, w.shape[0], height, width)))
