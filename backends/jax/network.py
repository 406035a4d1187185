"""The EDM2 network as pure functions that walk the plan, in the layout that accelerators like: NHWC, HWIO.

Parameters are a flat dict of canonical names in the native layout of :mod:`.weights`. Activations run in ``dtype``; the
noise-conditioned path, weights and norms in float32. Nothing is kept between calls, so jit, grad, jvp and sharding see
plain functions.
"""

from collections.abc import Mapping
from functools import partial
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from edm2_core import mp
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import precondition

Params = Mapping[str, Array]
PRODUCT = "product"  # the name of what is kept for the way back: all else is cheaper to compute again than to store
_PIXELS = 1 << 12  # whose neighbourhoods are laid out at a time
_EPS = 1e-4


def normalize(x: Array, axes: tuple[int, ...]) -> Array:
    """Scale to unit root mean square over ``axes``, norms in float32. See :func:`edm2_core.mp.normalize`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # a norm's derivative at 0 is what it is for all small x: that of x / eps
    square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    zero = square == 0
    norm = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    return (wide / (_EPS + norm)).astype(x.dtype)


def fan_axes(weight: Array) -> tuple[int, ...]:
    """All axes of a native weight but that of its outputs, the last."""
    return tuple(range(weight.ndim - 1))


def effective_weight(weight: Array, gain: Any = 1.0) -> Array:
    """See :func:`edm2_core.mp.mp_weight`."""
    return normalize(weight, fan_axes(weight)) * (gain / sqrt(prod(weight.shape[:-1])))


def layer(x: Array, weight: Array, gain: Any = 1.0) -> Array:
    """A linear layer [N, C], or a convolution [N, H, W, C] that keeps the size."""
    w = effective_weight(weight, gain).astype(x.dtype)
    product = x @ w.reshape(w.shape[-2:]) if prod(w.shape[:-2]) == 1 else convolution(x, w)
    return checkpoint_name(product, PRODUCT)


@jax.custom_jvp
def convolution(x: Array, w: Array) -> Array:
    """[N, H, W, C] with a kernel [kh, kw, C, D] of odd sizes, keeping the size.

    Its derivative along the kernel is said in matrix products on CPUs, so that the kernel's gradient is such a sum too:
    as a convolution, whose windows are as large as images, it takes longer there.
    """
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@convolution.defjvp
def _convolution_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, w), (dx, dw) = primals, tangents
    along_w = lax.platform_dependent(x, dw, cpu=by_products, default=convolution)
    return convolution(x, w), convolution(dx, w) + along_w


def by_products(x: Array, w: Array) -> Array:
    """:func:`convolution`, a few images at a time, as a product of the pixels' neighbourhoods and the kernel."""
    (n, height, width, channels), (kh, kw) = x.shape, w.shape[:2]
    matrix = w.reshape(-1, w.shape[-1])
    some = max(c for c in range(1, n + 1) if n % c == 0 and (c == 1 or c * height * width <= _PIXELS))

    @jax.checkpoint  # keeps x for the way back, not all its shifted copies
    def convolved(images: Array) -> Array:
        padded = jnp.pad(images, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
        shifted = [padded[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]
        return jnp.concatenate(shifted, axis=-1) @ matrix

    if some == n:
        return convolved(x)
    return lax.map(convolved, x.reshape(-1, some, height, width, channels)).reshape(n, height, width, -1)


def denoise(
    config: NetworkConfig,
    params: Params,
    x: Array,
    sigma: Array,
    labels: Array | None = None,
    *,
    dtype: Any = jnp.float32,
    dropout: Array | None = None,
) -> tuple[Array, Array]:
    """The denoiser D and its uncertainty u. See :func:`edm2_core.reference.denoise`.

    float32 x [N, H, W, C], sigma [N, 1, 1, 1] and labels [N, label_dim] or None to denoised and logvar [N, 1, 1, 1].
    ``dropout``: a key, in training; None: none.
    """
    c = precondition(sigma, sigma_data=config.sigma_data)
    c_noise = c.c_noise.reshape(-1)
    output = unet(config, params, (x * c.c_in).astype(dtype), c_noise, labels, dropout=dropout).astype(x.dtype)
    features = mp.mp_fourier(c_noise, params["logvar_fourier.freqs"], params["logvar_fourier.phases"])
    logvar = layer(features, params["logvar_linear.weight"]).reshape(-1, 1, 1, 1)
    return c.c_skip * x + c.c_out * output, logvar


def unet(
    config: NetworkConfig, params: Params, x: Array, c_noise: Array, labels: Array | None, *, dropout: Array | None
) -> Array:
    """The raw network F. See :func:`edm2_core.reference.unet`."""
    walk, emb = plan(config), embedding(config, params, c_noise, labels)
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    skips = []
    for index, block in enumerate(walk.encoder):
        x = run_block(config, params, block, x, emb, _fold(dropout, index))
        skips.append(x)
    for index, block in enumerate(walk.decoder, len(walk.encoder)):
        if block.takes_skip:
            x = mp.mp_cat(x, skips.pop(), axis=-1, t=config.concat_balance)
        x = run_block(config, params, block, x, emb, _fold(dropout, index))
    return layer(x, params["unet.out_conv.weight"], params["unet.out_gain"])


def embedding(config: NetworkConfig, params: Params, c_noise: Array, labels: Array | None) -> Array:
    features = mp.mp_fourier(c_noise, params["unet.emb_fourier.freqs"], params["unet.emb_fourier.phases"])
    emb = layer(features, params["unet.emb_noise.weight"])
    if config.label_dim:
        hot = jnp.zeros((len(c_noise), config.label_dim), emb.dtype) if labels is None else labels
        label = layer(hot * sqrt(config.label_dim), params["unet.emb_label.weight"])
        emb = mp.mp_sum(emb, label, t=config.label_balance)
    return mp.mp_silu(emb)


@partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT), static_argnums=(0, 2))
def run_block(
    config: NetworkConfig, params: Params, block: Block, x: Array, emb: Array, dropout: Array | None
) -> Array:
    """One encoder or decoder block of Figure 22. See :func:`edm2_core.reference.run_block`."""
    if block.role == "conv":
        return layer(x, params[f"{block.name}.weight"])
    own = {name: params[f"{block.name}.{name}.weight"] for name in ("conv_res0", "emb_linear", "conv_res1")}
    skip = params[f"{block.name}.conv_skip.weight"] if block.has_conv_skip else None
    x = resample(x, block.resample, config.resample_filter)
    if block.role == "enc":
        x = normalize(x if skip is None else layer(x, skip), (-1,))
    scale = layer(emb, own["emb_linear"], params[f"{block.name}.emb_gain"]) + 1
    y = layer(mp.mp_silu(x), own["conv_res0"])
    y = mp.mp_silu(y * scale[:, None, None, :].astype(y.dtype))
    if dropout is not None and config.dropout:
        kept = jax.random.bernoulli(dropout, 1 - config.dropout, y.shape)
        y = jnp.where(kept, y / (1 - config.dropout), 0).astype(y.dtype)
    y = layer(y, own["conv_res1"])
    if block.role == "dec" and skip is not None:
        x = layer(x, skip)
    x = mp.mp_sum(x, y, t=config.res_balance)
    if block.heads:
        y = attention(x, params[f"{block.name}.attn_qkv.weight"], block.heads)
        x = mp.mp_sum(x, layer(y, params[f"{block.name}.attn_proj.weight"]), t=config.attn_balance)
    return x if config.clip_act is None else jnp.clip(x, -config.clip_act, config.clip_act)


def attention(x: Array, weight: Array, heads: int) -> Array:
    """Cosine self-attention over pixels. See :func:`edm2_core.reference.attention`."""
    n, h, w, c = x.shape
    qkv = normalize(layer(x, weight).reshape(n, h * w, heads, c // heads, 3), (3,))
    q, k, v = (qkv[..., i] for i in range(3))
    scores = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=jnp.float32) / sqrt(c // heads)
    shares = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    return checkpoint_name(jnp.einsum("nhqk,nkhc->nqhc", shares, v), PRODUCT).reshape(n, h, w, c)


def resample(x: Array, mode: str, taps: tuple[float, ...]) -> Array:
    """See :func:`edm2_core.mp.resample`; here on NHWC."""
    if mode == "keep":
        return x
    n, h, w, c = x.shape
    if len(taps) == 2 and taps[0] == taps[1]:
        if mode == "down":
            return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    f = jnp.asarray(taps, x.dtype) / sum(taps)
    kernel = jnp.broadcast_to((f[:, None] * f[None])[:, :, None, None], (len(taps), len(taps), 1, c))
    common: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": c}
    half = len(taps) // 2
    if mode == "down":
        return lax.conv_general_dilated(x, kernel, (2, 2), [(half - 1, half - 1)] * 2, **common)
    turned = 4 * kernel[::-1, ::-1]
    return lax.conv_general_dilated(x, turned, (1, 1), [(half, half)] * 2, lhs_dilation=(2, 2), **common)


def _fold(key: Array | None, index: int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, index)
