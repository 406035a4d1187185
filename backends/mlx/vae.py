"""The decoder of an autoencoder of latents, in MLX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

import mlx.core as mx
import numpy as np
from mlx import nn

from backends.pipeline.checkpoints.autoencoder import (
    EPS,
    AutoencoderConfig,
    decode,
    local_folder,
    read_autoencoder,
)

from . import device as devices
from .convolution import convolve
from .weights import to_canonical, to_native


@dataclass(frozen=True)
class MLXOperations:
    """See :class:`backends.pipeline.checkpoints.autoencoder.Operations`; ``arrays`` are in the layout of
    :mod:`.weights`."""

    config: AutoencoderConfig
    arrays: Mapping[str, mx.array]

    def conv(self, name: str, x: mx.array, /) -> mx.array:
        return convolve(x, self.arrays[f"{name}.weight"]) + self.arrays[f"{name}.bias"]

    def linear(self, name: str, x: mx.array, /) -> mx.array:
        return x @ self.arrays[f"{name}.weight"].T + self.arrays[f"{name}.bias"]

    def norm(self, name: str, x: mx.array, /) -> mx.array:
        grouped = x.reshape(*x.shape[:3], self.config.norm_num_groups, -1)  # (N, H, W, groups, C / groups)
        grouped = grouped - grouped.mean(axis=(1, 2, 4), keepdims=True)
        grouped = grouped * mx.rsqrt(grouped.square().mean(axis=(1, 2, 4), keepdims=True) + EPS)
        return grouped.reshape(x.shape) * self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]

    def silu(self, x: mx.array, /) -> mx.array:
        return nn.silu(x)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, /) -> mx.array:
        heads = (x[:, None] for x in (q, k, v))  # each (N, 1, pixels, C)
        return mx.fast.scaled_dot_product_attention(*heads, scale=1 / sqrt(q.shape[-1]))[:, 0]

    def double(self, x: mx.array, /) -> mx.array:
        return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


def open_decoder(
    name: str, device: str | None = None, only_local: bool = False, /
) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of an autoencoder, a folder or an ID of the hub.

    It takes latents in the autoencoder's own units (not scaled), float32 [N, C, h, w], to images, float32 [N, 3, H, W],
    nominally from -1 to 1.

    Raises:
        InputError: no such autoencoder, or one that cannot be read.
    """
    vae, place = read_autoencoder(local_folder(name, only_local=only_local)), devices.choose(device)
    with mx.stream(place):
        run = MLXOperations(vae.config, {key: to_native(array) for key, array in vae.arrays.items()})

    def apply(latents: np.ndarray) -> np.ndarray:
        vae.config.check_latents(latents)
        with mx.stream(place):
            return np.concatenate([to_canonical(decode(vae.config, run, to_native(part[None]))) for part in latents])

    return apply
