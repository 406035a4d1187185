"""The EDM2 network as pure functions that walk the plan, in the layout that accelerators like: NHWC, HWIO.

Parameters are a flat dict of canonical names in the native layout of :mod:`.weights`. Activations run in ``dtype``; the
noise-conditioned path, weights and norms in float32. Nothing is kept between calls, so jit, grad, jvp and sharding see
plain functions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from edm2_core import arrays, mp
from edm2_core.ladder import Attention, GroupNorm
from edm2_core.network import Block, NetworkConfig, plan
from edm2_core.precond import precondition
from edm2_core.network import GROUP_NORM_EPS

Params = Mapping[str, Array]
PRODUCT = "product"  # the name of what is kept for the way back: all else is cheaper to compute again than to store
_PIXELS = 1 << 12  # whose neighbourhoods are laid out at a time
_EPS = 1e-4


_SEEN: ContextVar[dict[str, Array] | None] = ContextVar("seen", default=None)


@contextmanager
def watching() -> Iterator[dict[str, Array]]:
    """What layers put out within it, by name of the weight. Blocks then keep all they compute: for a way there only."""
    seen: dict[str, Array] = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def normalize(x: Array, axes: tuple[int, ...]) -> Array:
    """Scale to unit root mean square over ``axes``, norms in float32. See :func:`edm2_core.mp.normalize`."""
    wide = arrays.widened(x)
    # a norm's derivative at 0 is what it is for all small x: that of x / eps
    square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    zero = square == 0
    norm = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    return (wide / (_EPS + norm)).astype(x.dtype)


def fan_axes(weight: Array) -> tuple[int, ...]:
    """All axes of a native weight but that of its outputs, the last."""
    return tuple(range(weight.ndim - 1))


def layer(config: NetworkConfig, params: Params, name: str, x: Array, gain: Any = 1.0) -> Array:
    """A linear layer [N, C], or a convolution [N, H, W, C] that keeps the size. See :func:`edm2_core.reference.layer`.

    ``gain`` is the weight's alone.
    """
    w = params[f"{name}.weight"]
    own = normalize(w, fan_axes(w)) if config.switches.weight_norm else w
    w = (own * (gain * config.weight_scale(prod(w.shape[:-1])))).astype(x.dtype)
    product = checkpoint_name(x @ w.reshape(w.shape[-2:]) if prod(w.shape[:-2]) == 1 else convolution(x, w), PRODUCT)
    biased = f"{name}.bias" in plan(config).parameters
    y = product + params[f"{name}.bias"].astype(x.dtype) if biased else product
    if (seen := _SEEN.get()) is not None:
        seen[f"{name}.weight"] = y
    return y


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
    return c.c_skip * x + c.c_out * output, uncertainty(config, params, c_noise).reshape(-1, 1, 1, 1)


def uncertainty(config: NetworkConfig, params: Params, c_noise: Array) -> Array:
    """u of c_noise [N], with N elements. See :func:`edm2_core.reference.uncertainty`."""
    if not config.switches.uncertainty:
        return jnp.zeros_like(c_noise)
    return layer(config, params, "logvar_linear", fourier(config, params, "logvar_fourier", c_noise))


def unet(
    config: NetworkConfig, params: Params, x: Array, c_noise: Array, labels: Array | None, *, dropout: Array | None
) -> Array:
    """The raw network F. See :func:`edm2_core.reference.unet`."""
    walk, emb = plan(config), embedding(config, params, c_noise, labels)
    if walk.switches.ones_channel:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    skips = []
    for index, block in enumerate(walk.encoder):
        x = run_block(config, params, block, x, emb, _fold(dropout, index))
        skips.append(x)
    for index, block in enumerate(walk.decoder, len(walk.encoder)):
        if block.takes_skip:
            x = joined(config, x, skips.pop())
        x = run_block(config, params, block, x, emb, _fold(dropout, index))
    if walk.switches.output_norm:
        x = silu(config, group_norm(config, params, "unet.out_norm", x))
    return layer(config, params, "unet.out_conv", x, params["unet.out_gain"] if walk.switches.gains else 1.0)


def embedding(config: NetworkConfig, params: Params, c_noise: Array, labels: Array | None) -> Array:
    """The conditioning vector, [N, emb_channels]. See :func:`edm2_core.reference.embedding`."""
    has = config.switches
    emb = layer(config, params, "unet.emb_noise", fourier(config, params, "unet.emb_fourier", c_noise))
    if has.embedding_layers == 2:
        emb = layer(config, params, "unet.emb_noise1", silu(config, emb))
    if config.label_dim:
        hot = jnp.zeros((len(c_noise), config.label_dim), emb.dtype) if labels is None else labels
        scale = sqrt(config.label_dim) if has.label_scaling else 1.0
        emb = summed(config, emb, layer(config, params, "unet.emb_label", hot * scale), config.label_balance)
    return silu(config, emb)


def run_block(
    config: NetworkConfig, params: Params, block: Block, x: Array, emb: Array, dropout: Array | None
) -> Array:
    """:func:`whole_block`, of which only products are kept for the way back."""
    run = whole_block if _SEEN.get() is not None else _thrifty_block
    return run(config, params, block, x, emb, dropout)


def whole_block(
    config: NetworkConfig, params: Params, block: Block, x: Array, emb: Array, dropout: Array | None
) -> Array:
    """One block, or the first convolution. See :func:`edm2_core.reference.run_block`."""
    name, has = block.name, config.switches
    if block.role == "conv":
        return layer(config, params, name, x)

    def resampled(x: Array, *, now: bool) -> Array:
        return resample(x, block.resample, config.resample_filter) if now else x

    def widened(x: Array, *, now: bool) -> Array:
        return layer(config, params, f"{name}.conv_skip", x) if block.has_conv_skip and now else x

    x = widened(resampled(x, now=has.resample_first), now=block.widens_first)
    if block.role == "enc" and has.pixel_norm:
        x = normalize(x, (-1,))
    y = silu(config, group_norm(config, params, f"{name}.norm_res0", x))
    y = layer(config, params, f"{name}.conv_res0", resampled(y, now=not has.resample_first))
    y = group_norm(config, params, f"{name}.norm_res1", y)
    y = silu(config, conditioned(config, params, block, y, emb))
    if dropout is not None and config.dropout:
        kept = jax.random.bernoulli(dropout, 1 - config.dropout, y.shape)
        y = jnp.where(kept, y / (1 - config.dropout), 0).astype(y.dtype)
    y = layer(config, params, f"{name}.conv_res1", y)
    x = widened(resampled(x, now=not has.resample_first), now=not block.widens_first)
    x = summed(config, x, y, config.res_balance)
    if block.heads:
        x = summed(config, x, attention(config, params, block, x), config.attn_balance)
    return x if config.clip_act is None else jnp.clip(x, -config.clip_act, config.clip_act)


_thrifty_block = jax.checkpoint(
    whole_block, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT), static_argnums=(0, 2)
)


def conditioned(config: NetworkConfig, params: Params, block: Block, y: Array, emb: Array) -> Array:
    """y scaled by the embedding, and shifted. See :func:`edm2_core.reference.conditioning`."""
    name, has = block.name, config.switches
    z = layer(config, params, f"{name}.emb_linear", emb, params[f"{name}.emb_gain"] if has.gains else 1.0)
    scale, shift = z[:, None, None, : block.out_channels] + 1, z[:, None, None, block.out_channels :]
    y = y * scale.astype(y.dtype)
    return y + shift.astype(y.dtype) if has.shift else y


def attention(config: NetworkConfig, params: Params, block: Block, x: Array) -> Array:
    """Self-attention over pixels. See :func:`edm2_core.reference.attention`."""
    (n, h, w, c), heads, name = x.shape, block.heads, block.name
    cosine = config.switches.attention is Attention.COSINE
    y = x if cosine else group_norm(config, params, f"{name}.norm_attn", x)
    qkv = layer(config, params, f"{name}.attn_qkv", y).reshape(n, h * w, heads, c // heads, 3)
    # dot products of what is not normalized may be of any size
    qkv = normalize(qkv, (3,)) if cosine else arrays.widened(qkv)
    q, k, v = (qkv[..., i] for i in range(3))
    scores = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=jnp.float32) / sqrt(c // heads)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = checkpoint_name(jnp.einsum("nhqk,nkhc->nqhc", shares, v).astype(x.dtype), PRODUCT)
    return layer(config, params, f"{name}.attn_proj", y.reshape(n, h, w, c))


def group_norm(config: NetworkConfig, params: Params, name: str, x: Array) -> Array:
    """x [N, H, W, C] over groups of channels and all pixels. See :func:`edm2_core.reference.group_norm`."""
    kind, axes = config.switches.group_norm, (1, 2, 4)
    if kind is GroupNorm.NONE:
        return x
    grouped = x.reshape(*x.shape[:3], config.groups(x.shape[3]), -1)
    if kind is GroupNorm.PLAIN:
        return normalize(grouped, axes).reshape(x.shape)
    y = arrays.widened(grouped)
    y = y - y.mean(axis=axes, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(axis=axes, keepdims=True) + GROUP_NORM_EPS)
    return (y.reshape(x.shape) * params[f"{name}.scale"] + params[f"{name}.bias"]).astype(x.dtype)


def silu(config: NetworkConfig, x: Array) -> Array:
    """See :func:`edm2_core.reference.silu`."""
    return mp.mp_silu(x) if config.switches.mp_functions else mp.silu(x)


def fourier(config: NetworkConfig, params: Params, name: str, x: Array) -> Array:
    """Features of x [N], [N, channels]. See :func:`edm2_core.reference.fourier`."""
    return jnp.cos(x[:, None] * params[f"{name}.freqs"] + params[f"{name}.phases"]) * config.fourier_scale


def summed(config: NetworkConfig, a: Array, b: Array, t: float) -> Array:
    """See :func:`edm2_core.reference.summed`."""
    keep, add = config.blend(t)
    return a * keep + b * add


def joined(config: NetworkConfig, x: Array, skip: Array) -> Array:
    """See :func:`edm2_core.reference.joined`."""
    keep, add = config.concat_blend(x.shape[-1], skip.shape[-1])
    return jnp.concatenate([x * keep, skip * add], axis=-1)


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
