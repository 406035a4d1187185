"""Canonical arrays to and from the layout that the network computes in. Names stay; axes are permuted, once.

A convolution is [out, in, kh, kw] on disk and [kh, kw, in, out] here, a linear layer [out, in] and [in, out]: the axis
of outputs is the last. Arrays of one axis or none stay as they are. Images are NCHW on disk and NHWC here.
"""

from collections.abc import Callable, Collection, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from edm2_core.network import NetworkConfig, check_parameters, initialize, plan

from .device import gathered

Place = Callable[[np.ndarray], Array]
"""From a canonical array to a native one on its devices."""


def init_params(config: NetworkConfig, /, *, seed: int) -> dict[str, Array]:
    """Initial parameters of a network, ready for use: the same numbers in every port.

    Source: :func:`edm2_core.network.initialize`. Returns: native float32 arrays by name.
    """
    return load(config, initialize(config, seed=seed))


def load(config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, place: Place | None = None) -> dict[str, Array]:
    """Canonical ``params`` as native float32 arrays, copied by ``place``, by default :func:`to_device`. Raises
    InputError unless they are the config's."""
    check_parameters(config, params)
    return {name: (place or to_device)(array) for name, array in params.items()}


def load_divided(
    config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, place: Place | None = None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """:func:`load`, divided into what is trained and constants."""
    native, table = load(config, params, place=place), plan(config).parameters
    trained = {name: array for name, array in native.items() if table[name].trained}
    return trained, {name: array for name, array in native.items() if name not in trained}


def dump(params: Mapping[str, Array], names: Collection[str] | None = None, /) -> dict[str, np.ndarray]:
    """Native arrays, those of ``names`` or all, as canonical float32 NumPy arrays, copied, one after another. Where
    processes hold parts of them, all must call it together."""
    return {name: to_host(gathered(array)) for name, array in params.items() if names is None or name in names}


def to_device(array: np.ndarray, /) -> Array:
    """A canonical array as a native one, float32, copied."""
    return jnp.array(to_native(array), jnp.float32)


def to_host(array: Array | np.ndarray, /) -> np.ndarray:
    """A native array as a canonical one, float32, copied."""
    return np.array(to_canonical(np.asarray(array)), np.float32, order="C")


def to_native(array: np.ndarray, /) -> np.ndarray:
    """The axes of a parameter in native order."""
    return array.transpose(_native(array.ndim))


def to_canonical(array: np.ndarray, /) -> np.ndarray:
    """The axes of a parameter in canonical order."""
    return array.transpose(np.argsort(_native(array.ndim)) if array.ndim else ())


def _native(ndim: int) -> tuple[int, ...]:
    return {2: (1, 0), 4: (2, 3, 1, 0)}.get(ndim, tuple(range(ndim)))


def to_nhwc(images: np.ndarray, /) -> np.ndarray:
    """Images [N, C, H, W] as float32 [N, H, W, C]."""
    return np.asarray(images, np.float32).transpose(0, 2, 3, 1)


def to_nchw(images: Array, /) -> np.ndarray:
    """Images [N, H, W, C] as contiguous NumPy [N, C, H, W]."""
    return np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))
