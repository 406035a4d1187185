"""Canonical arrays to and from a PyTorch network. Names and layouts are the same; only the container changes."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .denoiser import Denoiser
from .network import Network

PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's


def canonical_name(name: str, /) -> str:
    """``name`` without the prefixes that wrapping a module in DDP or torch.compile adds, in any order."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return canonical_name(name.removeprefix(prefix))
    return name


def load(network: nn.Module, params: Mapping[str, np.ndarray], /) -> None:
    """Copy ``params`` into ``network``. Raises InputError, and copies nothing, unless names and shapes are its own."""
    own = tensors(network)
    for name in sorted(own.keys() | params.keys()):
        need, got = (tuple(arrays[name].shape) if name in arrays else None for arrays in (own, params))
        if need != got:
            raise InputError(f"{name} must have shape {need}, got {got}: use parameters of the same network")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(params[name])))


def dump(values: Mapping[str, Tensor], /) -> dict[str, np.ndarray]:
    """Tensors by name as NumPy arrays in memory of their own. Dtype: floats become float32, others keep theirs."""
    return {name: _host(value.detach()) for name, value in values.items()}


def _host(value: Tensor) -> np.ndarray:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.to("cpu", dtype, copy=True).numpy()


def tensors(network: nn.Module, /) -> dict[str, Tensor]:
    """Parameters and buffers of ``network`` by canonical name, sharing its memory."""
    return {canonical_name(name): value for name, value in network.state_dict(keep_vars=True).items()}


def build(
    config: NetworkConfig,
    params: Mapping[str, np.ndarray],
    /,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network with these parameters on ``device``, computing in ``dtype``, in evaluation mode.

    Raises:
        InputError: names or shapes of ``params`` are not the config's.
    """
    check_parameters(config, params)
    with torch.device("meta"):  # initial weights would be overwritten: none are drawn
        network = Network(config, dtype=dtype)
    network.to_empty(device=device).eval()
    load(network, params)
    return network


def unwrapped(network: nn.Module, /) -> Denoiser:
    """The denoiser inside DDP and torch.compile."""
    while not isinstance(network, Denoiser):
        network = network.module if hasattr(network, "module") else network._orig_mod  # type: ignore[assignment]
    return network
