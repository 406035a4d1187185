"""Canonical arrays to and from an MLX network. Names stay; axes move, once.

A convolution is [out, in, kh, kw] on disk and [out, kh, kw, in] here; all else is the same in both. The type says which
it is: NumPy arrays are canonical and MLX arrays are native, so converting what has been converted changes nothing.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from edm2_core.network import NetworkConfig, check_parameters

from .network import Network


def build(config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, dtype: mx.Dtype = mx.float32) -> Network:
    """A network with these parameters, computing in ``dtype``, in evaluation mode.

    Raises:
        InputError: names and shapes other than the config's.
    """
    network = Network(config, dtype=dtype)
    load(network, params)
    return network


def load(network: Network, params: Mapping[str, np.ndarray], /) -> None:
    """Give ``network`` copies of canonical ``params``. Raises InputError unless names and shapes are the config's."""
    check_parameters(network.config, params)
    network.load_weights([(name, to_native(array)) for name, array in params.items()])
    mx.eval(network.parameters())


def dump(values: Mapping[str, mx.array], /) -> dict[str, np.ndarray]:
    """Native arrays as canonical float32 NumPy arrays of their own."""
    return {name: to_canonical(value) for name, value in values.items()}


def tensors(network: nn.Module, /) -> dict[str, mx.array]:
    """Parameters and constants of ``network`` by canonical name."""
    return dict(tree_flatten(network.parameters()))


def to_native(array: np.ndarray | mx.array, /) -> mx.array:
    """A canonical array as float32 in the native layout; a native one as it is."""
    if isinstance(array, mx.array):
        return array
    moved = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return mx.array(np.array(moved, np.float32, order="C"))


def to_canonical(array: mx.array | np.ndarray, /) -> np.ndarray:
    """A native array as float32 in the canonical layout, contiguous; a canonical one as it is."""
    if isinstance(array, np.ndarray):
        return array
    found = np.array(array.astype(mx.float32))
    return np.array(found.transpose(0, 3, 1, 2) if array.ndim == 4 else found, np.float32, order="C")


def to_nhwc(images: np.ndarray, /) -> mx.array:
    return mx.array(np.ascontiguousarray(np.asarray(images, np.float32).transpose(0, 2, 3, 1)))


def to_nchw(images: mx.array, /) -> np.ndarray:
    return np.ascontiguousarray(np.array(images.astype(mx.float32)).transpose(0, 3, 1, 2))
