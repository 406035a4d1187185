"""Canonical arrays to and from a PyTorch network. Names and layouts are the same; only the container changes."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from backends.pipeline.checkpoints.safetensors_io import BFLOAT16
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .denoiser import Denoiser
from .network import Network
from .sharded import is_sharded, placed_as

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, recomputation


def canonical_names(names: Iterable[str], /) -> dict[str, str]:
    """Each of the ``names`` of a module's parts without what wrapping the module, or parts of it, has added to it."""
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):  # of DistributedDataParallel
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain


def load(network: nn.Module, params: Mapping[str, np.ndarray], /) -> None:
    """Copy ``params`` into ``network``. Raises InputError, and copies nothing, unless names and shapes are its own."""
    own = tensors(network)
    for name in sorted(own.keys() | params.keys()):
        need, got = (tuple(arrays[name].shape) if name in arrays else None for arrays in (own, params))
        if need != got:
            raise InputError(f"{name} must have shape {need}, got {got}: use parameters of the same network")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed_as(tensor, torch.from_numpy(np.array(params[name]))))


def dump(values: Mapping[str, Tensor], names: Collection[str] | None = None, /) -> dict[str, np.ndarray]:
    """Tensors by name, those of ``names`` or all, as NumPy arrays in memory of their own. Dtype: floats become float32,
    others keep theirs."""
    return {name: _host(value.detach()) for name, value in values.items() if names is None or name in names}


def _host(value: Tensor) -> np.ndarray:
    return to_numpy(value.float() if value.is_floating_point() else value)


def to_numpy(value: Tensor, /, *, copy: bool = True) -> np.ndarray:
    """A NumPy copy in the dtype of ``value``; without ``copy``, its own memory where that is possible. Of a DTensor the
    whole, which all its processes must ask for together."""
    whole = value.full_tensor() if is_sharded(value) else value
    on_cpu = whole.detach().to("cpu", copy=copy).contiguous()
    return on_cpu.view(torch.int16).numpy().view(BFLOAT16) if on_cpu.dtype == torch.bfloat16 else on_cpu.numpy()


def to_tensor(array: np.ndarray, /) -> Tensor:
    """The inverse of :func:`to_numpy`."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def tensors(network: nn.Module, /) -> dict[str, Tensor]:
    """Parameters and buffers of ``network`` by canonical name, sharing its memory."""
    state = dict(network.named_parameters()) | network.state_dict(keep_vars=True)  # which some modules shorten
    return {name: state[own] for own, name in canonical_names(state).items() if isinstance(state[own], Tensor)}


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
