"""The denoiser of any network: EDM preconditioning around a backbone, and a network with its parameters.

denoise = denoiser(backbone, sigma_data=0.5)        # backbone(params, x, c_noise, labels, key=...) -> like x
denoised, logvar = denoise(params, x, sigma)        # pure: jit, grad, vmap and sharding apply
network = Network(denoise, params)                  # for backends.jax.api.sample
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from edm2_core import precond
from edm2_core.network import NetworkConfig

Tree = Any  # a pytree of arrays


class Backbone(Protocol):
    """The raw network F: x [N, ...], scaled to unit variance, and c_noise [N] to an array like x.

    ``labels`` are whatever the denoiser was given; a condition is joined to x, on the last axis, and the result is like
    x without it; ``key`` are PRNG keys [N] in training (dropout), one an image, otherwise None.
    """

    def __call__(self, params: Tree, x: Array, c_noise: Array, labels: Any, /, *, key: Array | None) -> Array: ...


class Denoise(Protocol):
    """x [N, ..., C], sigma [N, 1, ...] with as many axes, and a condition [N, ..., cond_channels] in the units of x or
    None, to denoised, like x, and logvar, like sigma."""

    def __call__(
        self,
        params: Tree,
        x: Array,
        sigma: Array,
        labels: Any = None,
        condition: Array | None = None,
        /,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Array]: ...


def denoiser(
    backbone: Backbone, *, sigma_data: float = 0.5, uncertainty: Callable[[Tree, Array], Array] | None = None
) -> Denoise:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), with its uncertainty u. Source: Eqs. 4-8, 21.

    Args:
        backbone: the raw network F.
        sigma_data: standard deviation of the data.
        uncertainty: ``(params, c_noise [N]) -> u``, N elements, in training; None: u is 0.
    """

    def denoise(
        params: Tree,
        x: Array,
        sigma: Array,
        labels: Any = None,
        condition: Array | None = None,
        /,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        def raw(scaled: Array, c_noise: Array) -> Array:
            if condition is not None:
                scaled = precond.join_condition(scaled, condition, sigma_data=sigma_data, axis=-1)
            return backbone(params, scaled, c_noise, labels, key=key)

        denoised = precond.denoise(raw, x, sigma, sigma_data=sigma_data)
        if uncertainty is None:
            return denoised, jnp.zeros_like(sigma)
        c_noise = precond.precondition(sigma, sigma_data=sigma_data).c_noise.reshape(-1)  # [N]
        return denoised, uncertainty(params, c_noise).reshape(sigma.shape)

    return denoise


_META = ("apply", "config", "label_dim", "label_dropout", "cond_channels")


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=_META)
@dataclass(frozen=True)
class Network:
    """A network ready to use; a pytree, whose leaves are its parameters.

    ``apply(params, x, sigma, labels=None, condition=None) -> (denoised, logvar)`` is pure; calling the network is
    ``apply`` of its own parameters. ``label_dim`` and ``cond_channels`` are 0 for a network without labels or
    condition. ``label_dropout`` is the share of training images whose label is dropped
    (:func:`edm2_core.loss.drop_labels`); above 0, the network may be sampled without labels and guide itself.
    ``config`` is None for a backbone of one's own.
    """

    apply: Denoise
    params: Tree
    config: NetworkConfig | None = None
    label_dim: int = 0
    label_dropout: float = 0.0
    cond_channels: int = 0

    def __call__(
        self, x: Array, sigma: Array, labels: Array | None = None, condition: Array | None = None
    ) -> tuple[Array, Array]:
        """See :class:`Denoise`. Our own network takes x [N, H, W, C], sigma [N, 1, 1, 1], labels [N, label_dim] and a
        condition [N, H, W, cond_channels]."""
        return self.apply(self.params, x, sigma, labels, condition)


@partial(jax.tree_util.register_dataclass, data_fields=("network",), meta_fields=())
@dataclass(frozen=True)
class SamplingDenoiser:
    """A network as :func:`backends.ports.sample` takes it, compiled once for each shape; a pytree."""

    network: Network

    @property
    def label_dim(self) -> int:
        return self.network.label_dim

    @property
    def cond_channels(self) -> int:
        return self.network.cond_channels

    def __call__(
        self, x: Array, sigma: float | Array, labels: Array | None, condition: Array | None = None, /
    ) -> Array:
        given = (labels,) if condition is None else (labels, condition)  # a function of one's own may take none
        return _denoised(self.network.apply, self.network.params, x, sigma, *given)


@partial(jax.jit, static_argnums=0)
def _denoised(apply: Denoise, params: Tree, x: Array, sigma: Array, *given: Array | None) -> Array:
    levels = jnp.full((len(x), *(1,) * (x.ndim - 1)), sigma, jnp.float32)
    return apply(params, x, levels, *given)[0]
