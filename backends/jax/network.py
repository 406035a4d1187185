"""The EDM2 network as pure functions that walk the plan, in the layout that accelerators compute in: NHWC, HWIO.

Parameters are a flat dict of canonical names in the native layout of :mod:`.weights`. Activations run in ``dtype``; the
noise-conditioned path, weights and norms in float32. Nothing is kept between calls, so jit, grad, jvp and sharding
apply to all of it. The outputs of layers, where they are asked for, are returned beside the result.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from math import prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from edm2_core import mp
from edm2_core.ladder import Attention, GroupNorm
from edm2_core.network import GROUP_NORM_EPS, Block, NetworkConfig, plan

from . import weights
from .attention import Attend, by_products
from .convolution import convolution
from .denoiser import Denoise, Network, denoiser

Params = Mapping[str, Array]
Activations = dict[str, Array]  # outputs of layers, by name of the weight, bias and gain included
PRODUCT = "product"  # the name of what is saved for the backward pass where all else is recomputed
_EPS = 1e-4


class Scope(NamedTuple):
    """What the layers of one forward pass share.

    Where ``activations`` is a dict, layers add their outputs to it. The function that makes it returns it: it holds
    values of that function's trace alone.
    """

    config: NetworkConfig
    params: Params
    activations: Activations | None = None
    attend: Attend = by_products


def denoise(
    config: NetworkConfig,
    params: Params,
    x: Array,
    sigma: Array,
    labels: Array | None = None,
    condition: Array | None = None,
    *,
    dtype: Any = jnp.float32,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """The denoiser D and its uncertainty u. See :func:`edm2_core.reference.denoise`.

    Shapes: x [N, H, W, C]; sigma [N, 1, 1, 1]; labels [N, label_dim] or None; condition [N, H, W, cond_channels] or
    None. Returns: denoised [N, H, W, C] and logvar [N, 1, 1, 1]. Dtype: float32 in and out, activations in ``dtype``.
    ``key``: keys of dropout [N], one an image, in training; None: no dropout.
    """
    return network_denoiser(config, dtype)(params, x, sigma, labels, condition, key=key)


@lru_cache(maxsize=64)
def network_denoiser(
    config: NetworkConfig, dtype: Any = jnp.float32, recomputes: bool = False, attend: Attend = by_products, /
) -> Denoise:
    """:func:`denoise` of this config, with activations in ``dtype``; the same function each time. ``recomputes`` and
    ``attend``: as in :func:`unet`."""

    def backbone(params: Params, x: Array, c_noise: Array, labels: Any, /, *, key: Array | None) -> Array:
        how: Any = {"key": key, "recomputes": recomputes, "attend": attend}
        output, _ = unet(config, params, x.astype(dtype), c_noise, labels, **how)
        return output.astype(x.dtype)

    return _preconditioned(config, backbone)


def load_network(
    config: NetworkConfig,
    params: Mapping[str, np.ndarray],
    /,
    *,
    dtype: Any = jnp.float32,
    attend: Attend = by_products,
) -> Network:
    """A network of canonical ``params``, on JAX's default device. Raises InputError unless they are the config's."""
    denoise, loaded = network_denoiser(config, dtype, False, attend), weights.load(config, params)
    return Network(denoise, loaded, config, config.label_dim, config.label_dropout, config.cond_channels)


def denoise_with_activations(
    config: NetworkConfig,
    params: Params,
    x: Array,
    sigma: Array,
    labels: Array | None = None,
    condition: Array | None = None,
    *,
    dtype: Any = jnp.float32,
) -> tuple[Array, Array, Activations]:
    """:func:`denoise` without dropout, and the outputs of the layers of the U-Net before any nonlinearity.

    An activation is [N, H, W, C] or [N, C].
    """
    activations: Activations = {}

    def backbone(params: Params, x: Array, c_noise: Array, labels: Any, /, *, key: Array | None) -> Array:
        output, outputs = unet(config, params, x.astype(dtype), c_noise, labels, collect=True)
        activations.update(outputs)  # in the trace of this call: the denoiser adds none around its backbone
        return output.astype(x.dtype)

    denoised, logvar = _preconditioned(config, backbone)(params, x, sigma, labels, condition)
    return denoised, logvar, activations


def _preconditioned(config: NetworkConfig, backbone: Any) -> Denoise:
    learned = partial(uncertainty, config) if config.switches.uncertainty else None
    return denoiser(backbone, sigma_data=config.sigma_data, uncertainty=learned)


def uncertainty(config: NetworkConfig, params: Params, c_noise: Array) -> Array:
    """u of c_noise [N], as [N, 1]. See :func:`edm2_core.reference.uncertainty`."""
    scope = Scope(config, params)
    return layer(scope, "logvar_linear", fourier(scope, "logvar_fourier", c_noise))


def unet(
    config: NetworkConfig,
    params: Params,
    x: Array,
    c_noise: Array,
    labels: Array | None,
    *,
    key: Array | None = None,
    collect: bool = False,
    recomputes: bool = False,
    attend: Attend = by_products,
) -> tuple[Array, Activations]:
    """The raw network F, and its activations, {} unless ``collect``. See :func:`edm2_core.reference.unet`.

    ``recomputes``: for the backward pass only the products of layers are saved; all else is computed again.
    ``attend``: a function of :mod:`.attention`.
    Shapes: x [N, H, W, C + cond_channels]; c_noise [N]; labels [N, label_dim] or None; F [N, H, W, C].
    """
    activations: Activations = {}
    walk, scope = plan(config), Scope(config, params, activations if collect else None)
    key = key if config.dropout else None
    emb = embedding(scope, c_noise, labels)  # [N, emb_channels]
    x = jnp.pad(x, ((0, 0), *config.padding, (0, 0)))
    if walk.switches.ones_channel:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # [N, H, W, in_channels]
    skips: list[Array] = []
    for index, block in enumerate((*walk.encoder, *walk.decoder)):
        if block.takes_skip:
            x = joined(config, x, skips.pop())
        run = _run_recomputed if recomputes else run_block
        x, outputs = run(config, block, attend, collect, params, x, emb, _fold(key, index))
        activations.update(outputs)
        if index < len(walk.encoder):
            skips.append(x)
    if walk.switches.output_norm:
        x = silu(config, group_norm(scope, "unet.out_norm", x))
    x = layer(scope, "unet.out_conv", x, params["unet.out_gain"] if walk.switches.gains else 1.0)
    ((above, _), (left, _)), (height, width) = config.padding, config.image_size
    return x[:, above : above + height, left : left + width], activations


def embedding(scope: Scope, c_noise: Array, labels: Array | None) -> Array:
    """The conditioning vector, [N, emb_channels]. See :func:`edm2_core.reference.embedding`."""
    config, has = scope.config, scope.config.switches
    emb = layer(scope, "unet.emb_noise", fourier(scope, "unet.emb_fourier", c_noise))
    if has.embedding_layers == 2:
        emb = layer(scope, "unet.emb_noise1", silu(config, emb))
    if config.label_dim:
        one_hot = jnp.zeros((len(c_noise), config.label_dim), emb.dtype) if labels is None else labels
        scale = sqrt(config.label_dim) if has.label_scaling else 1.0
        emb = summed(config, emb, layer(scope, "unet.emb_label", one_hot * scale), config.label_balance)
    return silu(config, emb)


def run_block(
    config: NetworkConfig,
    block: Block,
    attend: Attend,
    collect: bool,
    params: Params,
    x: Array,
    emb: Array,
    key: Array | None,
) -> tuple[Array, Activations]:
    """One block, and its activations, {} unless ``collect``. See :func:`edm2_core.reference.run_block`."""
    activations: Activations = {}
    x = _block(Scope(config, params, activations if collect else None, attend), block, x, emb, key)
    return x, activations


_run_recomputed = jax.checkpoint(
    run_block, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT), static_argnums=(0, 1, 2, 3)
)


def _block(scope: Scope, block: Block, x: Array, emb: Array, key: Array | None) -> Array:
    config, has, name = scope.config, scope.config.switches, block.name
    if block.role == "conv":
        return layer(scope, name, x)

    def resampled(x: Array, *, now: bool) -> Array:
        return resample(x, block.resample, config.resample_filter) if now else x

    def channels_changed(x: Array, *, now: bool) -> Array:
        return layer(scope, f"{name}.conv_skip", x) if block.has_conv_skip and now else x

    # x is [N, h, w, in_channels], of the resolution before the block
    x = channels_changed(resampled(x, now=has.resample_first), now=block.widens_first)
    if block.role == "enc" and has.pixel_norm:
        x = normalize(x, (-1,))
    y = silu(config, group_norm(scope, f"{name}.norm_res0", x))
    y = layer(scope, f"{name}.conv_res0", resampled(y, now=not has.resample_first))  # [N, H, W, out_channels]
    y = group_norm(scope, f"{name}.norm_res1", y)
    y = silu(config, conditioned(scope, block, y, emb))
    if key is not None and config.dropout:
        kept = jax.vmap(partial(jax.random.bernoulli, p=1 - config.dropout, shape=y.shape[1:]))(key)
        y = jnp.where(kept, y / (1 - config.dropout), 0).astype(y.dtype)
    y = layer(scope, f"{name}.conv_res1", y)
    x = channels_changed(
        resampled(x, now=not has.resample_first), now=not block.widens_first
    )  # [N, H, W, out_channels]
    x = summed(config, x, y, config.res_balance)
    if block.heads:
        x = summed(config, x, attention(scope, block, x), config.attn_balance)
    return x if config.clip_act is None else jnp.clip(x, -config.clip_act, config.clip_act)


def conditioned(scope: Scope, block: Block, y: Array, emb: Array) -> Array:
    """y scaled by the embedding, and shifted. See :func:`edm2_core.reference.conditioning`."""
    name, has = block.name, scope.config.switches
    # z [N, out_channels], or twice as many where there is a shift
    z = layer(scope, f"{name}.emb_linear", emb, scope.params[f"{name}.emb_gain"] if has.gains else 1.0)
    scale, shift = z[:, None, None, : block.out_channels] + 1, z[:, None, None, block.out_channels :]
    y = y * scale.astype(y.dtype)
    return y + shift.astype(y.dtype) if has.shift else y


def attention(scope: Scope, block: Block, x: Array) -> Array:
    """Self-attention over pixels. See :func:`edm2_core.reference.attention`."""
    (n, h, w, c), heads, name = x.shape, block.heads, block.name
    cosine = scope.config.switches.attention is Attention.COSINE
    y = x if cosine else group_norm(scope, f"{name}.norm_attn", x)
    qkv = layer(scope, f"{name}.attn_qkv", y)  # [N, h, w, 3 C]
    qkv = qkv.reshape(n, h * w, heads, c // heads, 3)  # [N, h w, heads, C / heads, 3]
    # dot products of unnormalized queries and keys are unbounded: float32
    qkv = normalize(qkv, (3,)) if cosine else widened(qkv)
    q, k, v = (qkv[..., i] for i in range(3))  # [N, h w, heads, C / heads]
    y = checkpoint_name(scope.attend(q, k, v).astype(x.dtype), PRODUCT)
    return layer(scope, f"{name}.attn_proj", y.reshape(n, h, w, c))


def layer(scope: Scope, name: str, x: Array, gain: Any = 1.0) -> Array:
    """A linear layer [N, C], or a convolution [N, H, W, C] that keeps the size. See :func:`edm2_core.reference.layer`.

    ``gain`` multiplies the weight, not the bias.
    """
    config, params = scope.config, scope.params
    if (w := params.get(f"{name}.folded")) is None:
        w = effective_weight(config, params[f"{name}.weight"], gain)
    w = w.astype(x.dtype)
    y = checkpoint_name(x @ w if w.ndim == 2 else convolution(x, w), PRODUCT)
    if f"{name}.bias" in plan(config).parameters:
        y = y + params[f"{name}.bias"].astype(x.dtype)
    if scope.activations is not None:
        scope.activations[f"{name}.weight"] = y
    return y


def effective_weight(config: NetworkConfig, weight: Array, gain: Any = 1.0) -> Array:
    """A weight as it is multiplied with: normalized, with its gain, scaled for its fan-in."""
    own = normalize(weight, fan_axes(weight)) if config.switches.weight_norm else weight
    return own * (gain * config.weight_scale(prod(weight.shape[:-1])))


@partial(jax.jit, static_argnums=0, static_argnames="dtype")
def folded(config: NetworkConfig, params: Params, /, *, dtype: str = "float32") -> dict[str, Array]:
    """``params`` with the weights that layers multiply with, computed once and for all: for a network that is only
    sampled from. Weights of the U-Net's features are in ``dtype``; those of the embedding stay in float32."""
    gains = {"unet.out_conv": "unet.out_gain"} if config.switches.gains else {}
    made: dict[str, Array] = {}
    for name, array in params.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            made[name] = array
            continue
        block = layer.removesuffix(".emb_linear")
        gain = f"{block}.emb_gain" if block != layer and config.switches.gains else gains.get(layer)
        weight = effective_weight(config, array, 1.0 if gain is None else params[gain])
        of_features = layer.startswith(("unet.enc", "unet.dec", "unet.out_conv")) and block == layer
        made[f"{layer}.folded"] = weight.astype(dtype) if of_features else weight
    return made


def widened(x: Array) -> Array:
    """``x`` in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalize(x: Array, axes: tuple[int, ...]) -> Array:
    """Scale to unit root mean square over ``axes``, norms in float32. See :func:`edm2_core.mp.normalize`."""
    wide = widened(x)
    # sqrt has no derivative at 0; there this is x / eps, the limit for small x
    square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    zero = square == 0
    norm = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    return (wide / (_EPS + norm)).astype(x.dtype)


def fan_axes(weight: Array) -> tuple[int, ...]:
    """All axes of a native weight but the last, which is that of its outputs."""
    return tuple(range(weight.ndim - 1))


def group_norm(scope: Scope, name: str, x: Array) -> Array:
    """x [N, H, W, C] over groups of channels and all pixels. See :func:`edm2_core.reference.group_norm`."""
    kind, axes = scope.config.switches.group_norm, (1, 2, 4)
    if kind is GroupNorm.NONE:
        return x
    grouped = x.reshape(*x.shape[:3], scope.config.groups(x.shape[3]), -1)  # [N, H, W, groups, C / groups]
    if kind is GroupNorm.PLAIN:
        return normalize(grouped, axes).reshape(x.shape)
    y = widened(grouped)
    y = y - y.mean(axis=axes, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(axis=axes, keepdims=True) + GROUP_NORM_EPS)
    y = y.reshape(x.shape) * scope.params[f"{name}.scale"] + scope.params[f"{name}.bias"]
    return y.astype(x.dtype)


def silu(config: NetworkConfig, x: Array) -> Array:
    """See :func:`edm2_core.reference.silu`."""
    return mp.mp_silu(x) if config.switches.mp_functions else mp.silu(x)


def fourier(scope: Scope, name: str, x: Array) -> Array:
    """Features [N, channels] of x [N]. See :func:`edm2_core.reference.fourier`."""
    angles = x[:, None] * scope.params[f"{name}.freqs"] + scope.params[f"{name}.phases"]
    return jnp.cos(angles) * scope.config.fourier_scale


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
            return x.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))  # [N, h / 2, w / 2, C]
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # [N, 2 h, 2 w, C]
    f = jnp.asarray(taps, x.dtype) / sum(taps)
    kernel = jnp.broadcast_to((f[:, None] * f[None])[:, :, None, None], (len(taps), len(taps), 1, c))
    common: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": c}
    half = len(taps) // 2
    if mode == "down":
        return lax.conv_general_dilated(x, kernel, (2, 2), [(half - 1, half - 1)] * 2, **common)
    flipped = 4 * kernel[::-1, ::-1]
    return lax.conv_general_dilated(x, flipped, (1, 1), [(half, half)] * 2, lhs_dilation=(2, 2), **common)


def _fold(key: Array | None, index: int) -> Array | None:
    return None if key is None else jax.vmap(partial(jax.random.fold_in, data=index))(key)
