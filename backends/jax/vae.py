"""The decoder of an autoencoder of latents, in JAX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backends.pipeline.checkpoints.autoencoder import (
    EPS,
    AutoencoderConfig,
    decode,
    local_folder,
    read_autoencoder,
)

from . import device as devices
from .convolution import convolution
from .weights import to_device, to_nchw, to_nhwc


@dataclass(frozen=True)
class JaxOperations:
    """See :class:`backends.pipeline.checkpoints.autoencoder.Operations`; ``arrays`` are in the layout of
    :mod:`.weights`."""

    config: AutoencoderConfig
    arrays: Mapping[str, Array]

    def conv(self, name: str, x: Array, /) -> Array:
        return convolution(x, self.arrays[f"{name}.weight"]) + self.arrays[f"{name}.bias"]

    def linear(self, name: str, x: Array, /) -> Array:
        return x @ self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]

    def norm(self, name: str, x: Array, /) -> Array:
        grouped = x.reshape(*x.shape[:3], self.config.norm_num_groups, -1)  # [N, H, W, groups, C / groups]
        grouped = grouped - grouped.mean(axis=(1, 2, 4), keepdims=True)
        grouped = grouped * jax.lax.rsqrt(jnp.square(grouped).mean(axis=(1, 2, 4), keepdims=True) + EPS)
        return grouped.reshape(x.shape) * self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]

    def silu(self, x: Array, /) -> Array:
        return jax.nn.silu(x)

    def attend(self, q: Array, k: Array, v: Array, /) -> Array:
        logits = jnp.einsum("nqc,nkc->nqk", q, k) / sqrt(q.shape[-1])
        return jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(logits, axis=-1), v)

    def double(self, x: Array, /) -> Array:
        return x.repeat(2, axis=1).repeat(2, axis=2)


def open_decoder(
    name: str, device: str | None = None, only_local: bool = False, /
) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of an autoencoder, a folder or an ID of the hub.

    It takes latents in the autoencoder's own units (not scaled), float32 [N, C, h, w], to images, float32 [N, 3, H, W],
    nominally from -1 to 1.

    Raises:
        InputError: no such autoencoder, or one that cannot be read.
    """
    vae = read_autoencoder(local_folder(name, only_local=only_local))
    with jax.default_device(devices.choose_one(device)), jax.default_matmul_precision(devices.SAMPLING_MATMUL):
        arrays = {key: to_device(array) for key, array in vae.arrays.items()}
        run = jax.jit(partial(_decode, vae.config))

    def apply(latents: np.ndarray) -> np.ndarray:
        vae.config.check_latents(latents)
        with jax.default_matmul_precision(devices.SAMPLING_MATMUL):
            images: list[Any] = [to_nchw(run(arrays, to_nhwc(part[None]))) for part in latents]
        return np.concatenate(images)

    return apply


def _decode(config: AutoencoderConfig, arrays: Mapping[str, Array], z: Array) -> Array:
    images: Array = decode(config, JaxOperations(config, arrays), z)
    return images
