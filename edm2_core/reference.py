"""The whole network over the array API, slow and plain: with float64 NumPy arrays it is the oracle of every port.

The walk is that of :mod:`edm2_core.network`, with the switches of its rung; each layer is one of :mod:`edm2_core.mp`,
or what stood in its place before the paper changed it. Source: arXiv 2312.02696 Figures 16 to 22. Nothing here writes
in place, so libraries with automatic differentiation differentiate it. Dropout, which acts in training only, is not
part of it.
"""

from collections.abc import Mapping
from math import prod, sqrt

from . import loss as objective
from . import precond
from .arrays import Array, namespace
from .ladder import Attention, GroupNorm
from .mp import mp_cat, mp_fourier, mp_silu, mp_sum, mp_weight, normalize, resample
from .mp import silu as plain_silu
from .network import GROUP_NORM_EPS, Block, NetworkConfig, plan

Params = Mapping[str, Array]


def denoise(
    config: NetworkConfig, params: Params, x: Array, sigma: Array, labels: Array | None = None, /
) -> tuple[Array, Array]:
    """Denoise ``x`` at noise level ``sigma``; also the uncertainty u(sigma), 0 where none is learned.

    Shapes: x [N, C, H, W]; sigma [N, 1, 1, 1]; labels [N, label_dim], one-hot, or None for the unconditional answer.
    Returns: denoised [N, C, H, W] and logvar [N, 1, 1, 1], in the library and dtype of ``x``. Source: Eqs. 4-8, 21.
    """

    def backbone(scaled: Array, c_noise: Array) -> Array:
        return unet(config, params, scaled, c_noise, labels)

    denoised = precond.denoise(backbone, x, sigma, sigma_data=config.sigma_data)
    c_noise = precond.precondition(sigma, sigma_data=config.sigma_data).c_noise
    return denoised, uncertainty(config, params, namespace(x).reshape(c_noise, (-1,)))


def loss(
    config: NetworkConfig,
    params: Params,
    images: Array,
    unit_noise: Array,
    sigma: Array,
    labels: Array | None = None,
    /,
) -> Array:
    """The loss of each element, [N, C, H, W], of denoising ``images + sigma unit_noise``. Source: Eqs. 14, 21."""
    denoised, logvar = denoise(config, params, images + unit_noise * sigma, sigma, labels)
    return objective.loss(denoised, images, sigma, logvar, sigma_data=config.sigma_data)


def uncertainty(config: NetworkConfig, params: Params, c_noise: Array, /) -> Array:
    """u(sigma), [N, 1, 1, 1], from c_noise [N]. Source: Eq. 21 and Appendix B.2."""
    xp = namespace(c_noise)
    if not config.switches.uncertainty:
        return xp.reshape(xp.zeros_like(c_noise), (-1, 1, 1, 1))
    features = fourier(config, params, "logvar_fourier", c_noise)
    return xp.reshape(layer(config, params, "logvar_linear", features), (-1, 1, 1, 1))


def unet(config: NetworkConfig, params: Params, x: Array, c_noise: Array, labels: Array | None, /) -> Array:
    """The raw network F: x [N, C, H, W] already scaled by c_in, c_noise [N] to [N, C, H, W]."""
    xp, walk = namespace(x), plan(config)
    emb = embedding(config, params, c_noise, labels)
    if walk.switches.ones_channel:
        x = xp.concat([x, xp.ones_like(x[:, :1, ...])], axis=1)
    skips = []
    for block in walk.encoder:
        x = layer(config, params, block.name, x) if block.role == "conv" else run_block(config, block, params, x, emb)
        skips.append(x)
    for block in walk.decoder:
        if block.takes_skip:
            x = joined(config, x, skips.pop())
        x = run_block(config, block, params, x, emb)
    if walk.switches.output_norm:
        x = silu(config, group_norm(config, params, "unet.out_norm", x))
    return layer(config, params, "unet.out_conv", x, gain=params["unet.out_gain"] if walk.switches.gains else 1.0)


def embedding(config: NetworkConfig, params: Params, c_noise: Array, labels: Array | None, /) -> Array:
    """The conditioning vector, [N, emb_channels]. No labels are all-zero labels."""
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
    """One encoder or decoder block. Source: Figures 16 to 22."""
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
    """By what the residual branch is scaled, [N, C, 1, 1], and what is added to it: the same, or 0."""
    has, name = config.switches, block.name
    y = layer(config, params, f"{name}.emb_linear", emb, gain=params[f"{name}.emb_gain"] if has.gains else 1.0)
    scale, shift = y[:, : block.out_channels, None, None], y[:, block.out_channels :, None, None]
    return scale + 1, shift if has.shift else 0.0


def attention(config: NetworkConfig, block: Block, params: Params, x: Array, /) -> Array:
    """Self-attention over the pixels of x, [N, C, H, W]. Source: Eqs. 10-12, 30-34; in cosine attention values are
    normalized too.

    The channels of the 1x1 convolution's output are read as [heads, channels per head, 3 (q, k, v)].
    """
    xp, (n, c, h, w) = namespace(x), x.shape
    cosine = config.switches.attention is Attention.COSINE
    y = x if cosine else group_norm(config, params, f"{block.name}.norm_attn", x)
    qkv = xp.reshape(layer(config, params, f"{block.name}.attn_qkv", y), (n, block.heads, c // block.heads, 3, h * w))
    qkv = normalize(qkv, axis=2) if cosine else qkv
    q, k, v = (qkv[:, :, :, i, :] for i in range(3))
    logits = xp.matmul(xp.permute_dims(q, (0, 1, 3, 2)), k) * (1 / sqrt(c // block.heads))
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    y = xp.matmul(v, xp.permute_dims(weights, (0, 1, 3, 2)))
    return layer(config, params, f"{block.name}.attn_proj", xp.reshape(y, (n, c, h, w)))


def group_norm(config: NetworkConfig, params: Params, name: str, x: Array, /) -> Array:
    """x [N, C, H, W] normalized over groups of channels and all pixels. Source: Eq. 29 (plain), Appendix B.1 (affine).

    Departs from the paper: in the plain one eps is added to the root mean square, as in pixel norm.
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
    """Source: Eq. 81, or 9."""
    return mp_silu(x) if config.switches.mp_functions else plain_silu(x)


def fourier(config: NetworkConfig, params: Params, name: str, x: Array, /) -> Array:
    """Features of x, [N], to [N, channels]. Source: Eq. 75, or 35."""
    return mp_fourier(x, params[f"{name}.freqs"], params[f"{name}.phases"]) * (config.fourier_scale / sqrt(2))


def summed(config: NetworkConfig, a: Array, b: Array, /, *, t: float) -> Array:
    """Source: Eq. 88, or a plain sum."""
    return mp_sum(a, b, t=t) if config.switches.mp_functions else a + b


def joined(config: NetworkConfig, x: Array, skip: Array, /) -> Array:
    """Source: Eq. 103, or plain concatenation."""
    if config.switches.mp_functions:
        return mp_cat(x, skip, axis=1, t=config.concat_balance)
    return namespace(x).concat([x, skip], axis=1)


def layer(config: NetworkConfig, params: Params, name: str, x: Array, /, *, gain: float | Array = 1.0) -> Array:
    """The linear layer or convolution ``name``: its weight normalized (Eq. 47) or of the rung's scale, and its bias."""
    w = params[f"{name}.weight"]
    if config.switches.weight_norm:
        y = (linear if w.ndim == 2 else conv)(x, w, gain=gain)
    else:
        y = products(x, w * (gain * config.weight_scale(prod(w.shape[1:]))))
    if f"{name}.bias" not in plan(config).parameters:
        return y
    return y + namespace(x).reshape(params[f"{name}.bias"], (1, -1, *[1] * (w.ndim - 2)))


def linear(x: Array, w: Array, /, *, gain: float | Array = 1.0) -> Array:
    """Magnitude-preserving linear layer: x [N, in], w [out, in] to [N, out]. Source: Eq. 46."""
    return products(x, mp_weight(w, gain=gain))


def conv(x: Array, w: Array, /, *, gain: float | Array = 1.0) -> Array:
    """Magnitude-preserving convolution, zeros beyond the border: [N, in, H, W], w [out, in, k, k] to [N, out, H, W]."""
    return products(x, mp_weight(w, gain=gain))


def products(x: Array, w: Array, /) -> Array:
    """x [N, in] times w [out, in]; or [N, in, H, W] convolved with w [out, in, k, k], zeros beyond the border."""
    xp = namespace(x)
    if w.ndim == 2:
        return xp.matmul(x, xp.permute_dims(w, (1, 0)))
    n, c, height, width = x.shape
    size, pad = w.shape[-1], w.shape[-1] // 2
    if pad:
        column = xp.zeros_like(x[:, :, :, :pad])
        x = xp.concat([column, x, column], axis=3)
        row = xp.zeros_like(x[:, :, :pad, :])
        x = xp.concat([row, x, row], axis=2)
    shifted = (
        (w[:, :, i, j], xp.reshape(x[:, :, i : i + height, j : j + width], (n, c, height * width)))
        for i in range(size)
        for j in range(size)
    )
    return xp.reshape(sum(xp.matmul(tap, pixels) for tap, pixels in shifted), (n, w.shape[0], height, width))
