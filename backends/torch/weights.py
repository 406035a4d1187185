"""Canonical arrays to and from a PyTorch network. Names and layouts are the same; only the container changes."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edm2_core.network import NetworkConfig, check_parameters

from .network import Network

PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def canonical_name(name: str, /) -> str:
    """``name`` without the prefixes that wrapping a module in DDP or torch.compile adds, in any order."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return canonical_name(name.removeprefix(prefix))
    return name


def load(network: nn.Module, params: Mapping[str, np.ndarray], /) -> None:
    """Copy canonical ``params`` into ``network``. Raises InputError unless names and shapes are the config's."""
    check_parameters(unwrapped(network).config, params)
    with torch.no_grad():
        for name, tensor in tensors(network).items():
            tensor.copy_(torch.from_numpy(np.array(params[name])))


def dump(values: Mapping[str, Tensor], /) -> dict[str, np.ndarray]:
    """Tensors by name as NumPy arrays of their own: what is floating point in float32, all else in its own dtype."""
    return {name: _host(value.detach()) for name, value in values.items()}


def _host(value: Tensor) -> np.ndarray:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.to("cpu", dtype, copy=True).numpy()


def tensors(network: nn.Module, /) -> dict[str, Tensor]:
    """Parameters and constants of ``network`` by canonical name, sharing its memory."""
    return {canonical_name(name): value for name, value in network.state_dict(keep_vars=True).items()}


def build(
    config: NetworkConfig,
    params: Mapping[str, np.ndarray],
    /,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network with these parameters on ``device``, computing in ``dtype``, in evaluation mode."""
    network = Network(config, dtype=dtype).to(device).eval()
    load(network, params)
    return network


def unwrapped(network: nn.Module, /) -> Network:
    while not isinstance(network, Network):
        network = network.module if hasattr(network, "module") else network._orig_mod  # type: ignore[assignment]
    return network
