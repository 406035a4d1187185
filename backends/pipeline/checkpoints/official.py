"""Reading published EDM2 checkpoints, which are pickles, without executing anything in them. Needs PyTorch.

Such a file is a dict whose ``ema`` is a network, saved as its source text and its state, nested as its modules are. The
names in a pickle decide which code runs while it is read: here each allowed name stands for an inert function or class
of this module (:data:`_ALLOWED`), and any other name ends the reading. The storages inside are archives of PyTorch,
which ``torch.load`` opens with ``weights_only``.
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
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

import numpy as np

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .safetensors_io import TensorFile
from .snapshots import Snapshot, save_snapshot

LICENCE = "the published weights are NVIDIA's, under CC BY-NC-SA 4.0: not for commercial use, share alike"
_NAME = re.compile(r"-(\d{7})-(0\.\d{3})$")  # thousands of images, and sigma_rel


def read_official(path: str | Path, /, *, nimg: int | None = None, sigma_rel: float | None = None) -> Snapshot:
    """The averaged network in an official pickle as a :class:`Snapshot`.

    ``nimg`` and ``sigma_rel`` default to what the file's name says: ``...-{kimg:07d}-{std:.3f}.pkl``.

    Raises:
        InputError: no such file, a name in it that is not allowed, not an EDM2 network, or unknown time or length.
    """
    path = Path(path)
    named = _NAME.search(path.stem)
    if named is None and (nimg is None or sigma_rel is None):
        raise InputError(
            f"{path} must be named by its time and length, as in edm2-img512-s-2147483-0.130.pkl, got neither: "
            "add --nimg and --sigma-rel"
        )
    nimg = int(named[1]) * 1000 if nimg is None and named else int(nimg or 0)
    length = Length.of(float(named[2]) if sigma_rel is None and named else float(sigma_rel or 0))
    network = _network(path, _load(path))
    params = dict(_arrays(network))
    config = _config(path, network)
    try:
        check_parameters(config, params)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Snapshot(params=params, config=config, nimg=nimg, length=length)


def open_official(path: Path, /) -> TensorFile:
    """The network as an open snapshot, in a temporary file that is deleted with the returned object."""
    snapshot = read_official(path)
    folder = Path(mkdtemp(prefix="edm2-"))
    try:
        save_snapshot(folder / f"{path.stem}.safetensors", snapshot)
        file = TensorFile(folder / f"{path.stem}.safetensors")
    except BaseException:
        rmtree(folder)
        raise
    finalize(file, rmtree, folder)
    return file


@dataclass
class _Module:
    """A module of the network: the name of its class, and its attributes, which include its modules and arrays."""

    class_name: str = ""
    state: Mapping[str, Any] = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        self.class_name, self.state = "ModuleDict", dict(state)

    def part(self, name: str) -> Mapping[str, Any]:
        value = (self.state or {}).get(name)
        return value if isinstance(value, Mapping) else {}


class _EasyDict(dict[str, Any]):
    """A dict; attributes that a pickle sets on it have no effect."""


def _module(meta: Mapping[str, Any]) -> _Module:
    return _Module(str(meta["class_name"]), dict(meta["state"]))


def _parameter(array: np.ndarray, *_: Any) -> np.ndarray:
    return array


def _storage(archive: bytes) -> np.ndarray:
    """The numbers in a storage: float32 for all floating types."""
    import torch

    storage = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are deprecated, but these files have no others
        dtype = storage.dtype
        flat = torch.empty(0, dtype=dtype).set_(storage.untyped())
    return np.asarray(flat.float() if dtype.is_floating_point else flat)


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A strided view of a storage, copied. Raises ValueError where it reaches beyond the storage or is larger."""
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
    except (Exception, RecursionError) as error:  # many types, depending on the bytes
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
    """The config by the constructor arguments of the network and of its UNet, and by their attributes; for the rest the
    defaults, which are the official ones."""
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
