"""Canonical arrays to and from the layout that the network computes in. Names stay; axes move, once.

A convolution is [out, in, kh, kw] on disk and [kh, kw, in, out] here, a linear layer [out, in] and [in, out]: the axis
of outputs is the last. What has one axis or none is as it is.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from edm2_core.network import NetworkConfig, check_parameters


def load(config: NetworkConfig, params: Mapping[str, np.ndarray], /) -> dict[str, Array]:
    """Canonical ``params`` as float32 arrays of their own. Raises InputError unless they are the config's."""
    check_parameters(config, params)
    return {name: jnp.array(to_native(array), jnp.float32) for name, array in params.items()}


def dump(params: Mapping[str, Array], /) -> dict[str, np.ndarray]:
    """Native arrays as canonical float32 NumPy arrays of their own."""
    return {name: np.array(to_canonical(np.asarray(array)), np.float32, order="C") for name, array in params.items()}


def to_native(array: np.ndarray, /) -> np.ndarray:
    return array.transpose(_native(array.ndim))


def to_canonical(array: np.ndarray, /) -> np.ndarray:
    return array.transpose(np.argsort(_native(array.ndim)) if array.ndim else ())


def _native(ndim: int) -> tuple[int, ...]:
    return {2: (1, 0), 4: (2, 3, 1, 0)}.get(ndim, tuple(range(ndim)))


def to_nhwc(images: np.ndarray, /) -> np.ndarray:
    return np.asarray(images, np.float32).transpose(0, 2, 3, 1)


def to_nchw(images: Array, /) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))
