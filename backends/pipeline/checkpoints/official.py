"""What is in a published EDM2 checkpoint, a pickle, when nothing in it may be executed?

Such a file is a dict whose ``ema`` is a network, saved as its source text and its state, nested as its modules are. The
names in a pickle decide what runs while it is read; here each stands for something inert of ours, and a name that is
not in the table ends the reading. The storages inside are archives of PyTorch's, which it opens with weights only.
"""

import io
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.ema import sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .snapshots import Snapshot

LICENCE = "the published weights are NVIDIA's, under CC BY-NC-SA 4.0: not for commercial use, share alike"
_NAME = re.compile(r"-(\d{7})-(0\.\d{3})$")  # thousands of images, and the length


def read_official(path: str | Path, /, *, nimg: int | None = None, sigma_rel: float | None = None) -> Snapshot:
    """The averaged network in an official pickle, as a snapshot of ours. Needs PyTorch.

    Where ``nimg`` and ``sigma_rel`` are not given, the file's name says them: ``...-{kimg:07d}-{std:.3f}.pkl``.

    Raises:
        InputError: no such file, a name in it that is not allowed, no network of EDM2's, or nothing that says its time
            and length.
    """
    path = Path(path)
    found = _NAME.search(path.stem)
    if found is None and (nimg is None or sigma_rel is None):
        raise InputError(
            f"{path} must be named by its time and length, as in edm2-img512-s-2147483-0.130.pkl, got neither: "
            "add --nimg and --sigma-rel"
        )
    nimg = int(found[1]) * 1000 if nimg is None and found else int(nimg or 0)
    sigma_rel = float(found[2]) if sigma_rel is None and found else float(sigma_rel or 0)
    sigma_rel_to_gamma(sigma_rel)
    network = _network(path, _load(path))
    params = dict(_arrays(network))
    config = _config(path, network)
    try:
        check_parameters(config, params)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Snapshot(params=params, config=config, nimg=nimg, sigma_rel=sigma_rel)


@dataclass
class _Module:
    """A module of the network: its class's name, and its attributes, among them its modules and arrays."""

    class_name: str = ""
    state: Mapping[str, Any] = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        self.class_name, self.state = "ModuleDict", dict(state)

    def part(self, name: str) -> Mapping[str, Any]:
        value = (self.state or {}).get(name)
        return value if isinstance(value, Mapping) else {}


class _EasyDict(dict[str, Any]):
    """A dict; attributes that a pickle sets on it are nobody's business."""


def _module(meta: Mapping[str, Any]) -> _Module:
    return _Module(str(meta["class_name"]), dict(meta["state"]))


def _parameter(array: np.ndarray, *_: Any) -> np.ndarray:
    return array


def _storage(archive: bytes) -> np.ndarray:
    """The numbers in a storage: float32 for all floating types."""
    import torch

    found = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # storages that know their dtype are deprecated; files have no others
        dtype = found.dtype
        flat = torch.empty(0, dtype=dtype).set_(found.untyped())
    return np.asarray(flat.float() if dtype.is_floating_point else flat)


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """The elements that a tensor sees of its storage. Raises ValueError where it looks beyond, or sees one twice."""
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError("a tensor of impossible shape")
    if math.prod(size) and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        raise ValueError("a tensor that reaches beyond its storage")
    if math.prod(size) > storage.size:
        raise ValueError("a tensor larger than its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


_ALLOWED = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch.nn.modules.container", "ModuleDict"): _Module,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _Refused(Exception):
    """A name that is not in the table."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def _load(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got '{error.strerror}': check the path") from error
    except _Refused as error:
        raise InputError(
            f"{path} must name only what official EDM2 pickles do, got {error}: it may run code, do not trust it"
        ) from error
    except ModuleNotFoundError:
        raise
    except (Exception, RecursionError) as error:  # the bytes decide what goes wrong
        why = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"{path} must be an official EDM2 pickle, got a fault, '{why:.160}': copy it again") from error


def _network(path: Path, content: Any) -> _Module:
    network = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(network, _Module) or network.class_name != "Precond":
        got = network.class_name if isinstance(network, _Module) else f"a {type(network).__name__}"
        raise InputError(f"{path} must hold an EDM2 network called ema, a Precond, got {got}: choose another file")
    return network


def _arrays(module: _Module, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for kind in ("_parameters", "_buffers"):
        for name, array in module.part(kind).items():
            if isinstance(array, np.ndarray):
                yield f"{prefix}{name}", array
    for name, inner in module.part("_modules").items():
        if isinstance(inner, _Module):
            yield from _arrays(inner, f"{prefix}{name}.")


def _config(path: Path, network: _Module) -> NetworkConfig:
    """From what the network and its UNet were made with, and the attributes they keep; else our defaults, which are
    the official ones."""
    unet = network.part("_modules").get("unet")
    modules = [module for module in (unet, network) if isinstance(module, _Module)]
    given: dict[str, Any] = {}
    for module in modules:
        given |= module.part("_init_kwargs")
    for module in modules:
        given |= module.state
    names = {field.name for field in fields(NetworkConfig)}
    try:
        return NetworkConfig(**{name: _plain(value) for name, value in given.items() if name in names})
    except (InputError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{path} must hold a network's settings, got a fault: {why}: choose another file") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    raise ValueError(f"a setting that is a {type(value).__name__}")
