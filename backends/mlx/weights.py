"""Canonical NumPy arrays to and from MLX arrays. Names are the same in both; axes differ in arrays of four axes.

A convolution is [out, in, kh, kw] in files and [out, kh, kw, in] here, images are [N, C, H, W] there and [N, H, W, C]
here. The type tells which layout an array has: NumPy arrays are canonical and MLX arrays are native, so converting
twice changes nothing.
"""

from collections.abc import Collection, Mapping

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from edm2_core.network import NetworkConfig, check_parameters

from .network import Network


def build(config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, dtype: mx.Dtype = mx.float32) -> Network:
    """A network with copies of these canonical parameters, computing in ``dtype``.

    Raises:
        InputError: names and shapes other than the config's.
    """
    network = Network(config, dtype=dtype)  # its initial weights are lazy: replaced, they are never computed
    load(network, params)
    return network


def load(network: nn.Module, params: Mapping[str, np.ndarray], /) -> None:
    """Give ``network`` copies of canonical ``params``.

    Raises:
        InputError: names and shapes of a :class:`~backends.mlx.network.Network` other than its config's.
        ValueError: of any other module, other than its own.
    """
    if isinstance(network, Network):
        check_parameters(network.config, params)
    network.load_weights([(name, to_native(array)) for name, array in params.items()])
    mx.eval(network.parameters())


def dump(values: Mapping[str, mx.array], names: Collection[str] | None = None, /) -> dict[str, np.ndarray]:
    """Native arrays, those of ``names`` or all, as canonical float32 NumPy arrays of their own."""
    return {name: to_canonical(value) for name, value in values.items() if names is None or name in names}


def tensors(network: nn.Module, /) -> dict[str, mx.array]:
    """Parameters and constants of ``network`` by name."""
    return dict(tree_flatten(network.parameters()))


def to_native(array: np.ndarray | mx.array, /) -> mx.array:
    """A canonical array as float32 in the native layout; a native one as it is."""
    if isinstance(array, mx.array):
        return array
    native = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return mx.array(np.array(native, np.float32, order="C"))


def to_canonical(array: mx.array | np.ndarray, /) -> np.ndarray:
    """A native array as float32 in the canonical layout, contiguous; a canonical one as it is."""
    if isinstance(array, np.ndarray):
        return array
    values = np.array(array.astype(mx.float32))
    return np.array(values.transpose(0, 3, 1, 2) if array.ndim == 4 else values, np.float32, order="C")
