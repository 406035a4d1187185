"""The whole network over the array API, slow and plain: with float64 NumPy arrays it is the oracle of every port.

The walk is that of :mod:`edm2_core.network`; each layer is one of :mod:`edm2_core.mp`. Source: arXiv 2312.02696
Figure 22. Nothing here writes in place, so libraries with automatic differentiation differentiate it. Dropout, which
acts in training only, is not part of it.
"""

from collections.abc import Mapping
from math import sqrt

from . import loss as objective
from .arrays import Array, namespace
from .mp import mp_cat, mp_fourier, mp_silu, mp_sum, mp_weight, normalize, resample
from .network import Block, NetworkConfig, plan
from .precond import precondition

Params = Mapping[str, Array]


def denoise(
    config: NetworkConfig, params: Params, x: Array, sigma: Array, labels: Array | None = None, /
) -> tuple[Array, Array]:
    """Denoise ``x`` at noise level ``sigma``; also the uncertainty u(sigma).

    Shapes: x [N, C, H, W]; sigma [N, 1, 1, 1]; labels [N, label_dim], one-hot, or None for the unconditional answer.
    Returns: denoised [N, C, H, W] and logvar [N, 1, 1, 1], in the library and dtype of ``x``. Source: Eqs. 4-8, 21.
    """
    xp, c = namespace(x), precondition(sigma, sigma_data=config.sigma_data)
    c_noise = xp.reshape(c.c_noise, (-1,))
    output = unet(config, params, x * c.c_in, c_noise, labels)
    return c.c_skip * x + c.c_out * output, uncertainty(params, c_noise)


def loss(
    config: NetworkConfig,
    params: Params,
    images: Array,
    unit_noise: Array,
    sigma: Array,
    labels: Array | None = None,
    /,
) -> Array:
    """The loss of each element, [N, C, H, W], of denoising ``images + sigma unit_noise``. Source: Eq. 21."""
    denoised, logvar = denoise(config, params, images + unit_noise * sigma, sigma, labels)
    return objective.loss(denoised, images, sigma, logvar, sigma_data=config.sigma_data)


def uncertainty(params: Params, c_noise: Array, /) -> Array:
    """u(sigma), [N, 1, 1, 1], from c_noise [N]. Source: Eq. 21 and Appendix B.2."""
    features = mp_fourier(c_noise, params["logvar_fourier.freqs"], params["logvar_fourier.phases"])
    return namespace(features).reshape(linear(features, params["logvar_linear.weight"]), (-1, 1, 1, 1))


def unet(config: NetworkConfig, params: Params, x: Array, c_noise: Array, labels: Array | None, /) -> Array:
    """The raw network F: x [N, C, H, W] already scaled by c_in, c_noise [N] to [N, C, H, W]."""
    xp, walk = namespace(x), plan(config)
    emb = embedding(config, params, c_noise, labels)
    x = xp.concat([x, xp.ones_like(x[:, :1, ...])], axis=1)
    skips = []
    for block in walk.encoder:
        x = (
            conv(x, params[f"{block.name}.weight"])
            if block.role == "conv"
            else run_block(config, block, params, x, emb)
        )
        skips.append(x)
    for block in walk.decoder:
        if block.takes_skip:
            x = mp_cat(x, skips.pop(), axis=1, t=config.concat_balance)
        x = run_block(config, block, params, x, emb)
    return conv(x, params["unet.out_conv.weight"], gain=params["unet.out_gain"])


def embedding(config: NetworkConfig, params: Params, c_noise: Array, labels: Array | None, /) -> Array:
    """The conditioning vector, [N, emb_channels]. No labels are all-zero labels."""
    features = mp_fourier(c_noise, params["unet.emb_fourier.freqs"], params["unet.emb_fourier.phases"])
    emb = linear(features, params["unet.emb_noise.weight"])
    if config.label_dim:
        weight = params["unet.emb_label.weight"]
        from_label = linear(labels * sqrt(config.label_dim), weight) if labels is not None else emb * 0
        emb = mp_sum(emb, from_label, t=config.label_balance)
    return mp_silu(emb)


def run_block(config: NetworkConfig, block: Block, params: Params, x: Array, emb: Array, /) -> Array:
    """One encoder or decoder block. Source: Figure 22."""
    weights = {name: params[f"{block.name}.{name}.weight"] for name in ("emb_linear", "conv_res0", "conv_res1")}
    x = resample(x, mode=block.resample, filter=config.resample_filter)
    if block.role == "enc":
        x = conv(x, params[f"{block.name}.conv_skip.weight"]) if block.has_conv_skip else x
        x = normalize(x, axis=1)
    scale = linear(emb, weights["emb_linear"], gain=params[f"{block.name}.emb_gain"]) + 1
    y = conv(mp_silu(x), weights["conv_res0"])
    y = conv(mp_silu(y * scale[:, :, None, None]), weights["conv_res1"])
    if block.role == "dec" and block.has_conv_skip:
        x = conv(x, params[f"{block.name}.conv_skip.weight"])
    x = mp_sum(x, y, t=config.res_balance)
    if block.heads:
        x = mp_sum(x, attention(block, params, x), t=config.attn_balance)
    return x if config.clip_act is None else namespace(x).clip(x, -config.clip_act, config.clip_act)


def attention(block: Block, params: Params, x: Array, /) -> Array:
    """Cosine self-attention over the pixels of x, [N, C, H, W]. Source: Eqs. 10, 30-34; values are normalized too.

    The channels of the 1x1 convolution's output are read as [heads, channels per head, 3 (q, k, v)].
    """
    xp, (n, c, h, w) = namespace(x), x.shape
    qkv = conv(x, params[f"{block.name}.attn_qkv.weight"])
    qkv = normalize(xp.reshape(qkv, (n, block.heads, c // block.heads, 3, h * w)), axis=2)
    q, k, v = (qkv[:, :, :, i, :] for i in range(3))
    logits = xp.matmul(xp.permute_dims(q, (0, 1, 3, 2)), k) * (1 / sqrt(c // block.heads))
    weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    y = xp.matmul(v, xp.permute_dims(weights, (0, 1, 3, 2)))
    return conv(xp.reshape(y, (n, c, h, w)), params[f"{block.name}.attn_proj.weight"])


def linear(x: Array, w: Array, /, *, gain: float | Array = 1.0) -> Array:
    """Magnitude-preserving linear layer: x [N, in], w [out, in] to [N, out]. Source: Eq. 46."""
    xp = namespace(x)
    return xp.matmul(x, xp.permute_dims(mp_weight(w, gain=gain), (1, 0)))


def conv(x: Array, w: Array, /, *, gain: float | Array = 1.0) -> Array:
    """Magnitude-preserving convolution, zeros beyond the border: [N, in, H, W], w [out, in, k, k] to [N, out, H, W]."""
    xp, (n, c, height, width), w = namespace(x), x.shape, mp_weight(w, gain=gain)
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
