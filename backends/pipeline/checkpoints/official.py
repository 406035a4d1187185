"""Published EDM2 checkpoints, which are pickles, as snapshots; see :mod:`.inert_pickle`.

Such a file is a dict whose ``ema`` is a network, saved as its source text and its state, nested as its modules are. Its
``encoder`` says what the network's data are: 8-bit images, or latents with a scale and a bias of each channel.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.codec import Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters, plan

from . import inert_pickle
from .inert_pickle import Module, Stored, Values
from .safetensors_io import FileReader
from .snapshots import Metadata, Snapshot, read_params, with_params

LICENCE = "the published weights are NVIDIA's, under CC BY-NC-SA 4.0: not for commercial use, share alike"
_NAME = re.compile(r"-(\d{7})-(0\.\d{3})$")  # thousands of images, and sigma_rel


def read_official(path: str | Path, /, *, nimg: int | None = None, sigma_rel: float | None = None) -> Snapshot:
    """The averaged network in an official pickle as a :class:`Snapshot`.

    ``nimg`` and ``sigma_rel`` default to what the file's name says: ``...-{kimg:07d}-{std:.3f}.pkl``.

    Raises:
        InputError: no such file, a name in it that is not allowed, not an EDM2 network, or unknown time or length.
    """
    metadata, file = open_official(Path(path), nimg=nimg, sigma_rel=sigma_rel)
    return with_params(metadata, read_params(file, ()))


def read_any(path: Path, /) -> Snapshot:
    """:func:`read_official` of a file with any name; where it does not say, the time is 0 and the length unknown."""
    if _NAME.search(path.stem):
        return read_official(path)
    metadata, file = open_official(path, nimg=0, sigma_rel=0.1)
    return with_params(replace(metadata, length=None), read_params(file, ()))


def images_seen(kimg: int, /) -> int:
    """The images that a network in a file of ``kimg`` has seen: official runs save at multiples of 1024 and name files
    by whole thousands, rounded down; where there is no such multiple, ``kimg`` thousand."""
    rounded = -(-kimg * 1000 // 1024) * 1024
    return rounded if rounded < (kimg + 1) * 1000 else kimg * 1000


def open_official(
    path: Path, /, *, nimg: int | None = None, sigma_rel: float | None = None
) -> tuple[Metadata, "OfficialFile"]:
    """The metadata and the arrays of an official pickle, which are read from it when they are needed. Arguments and
    errors are those of :func:`read_official`."""
    named = _NAME.search(path.stem)
    if named is None and (nimg is None or sigma_rel is None):
        raise InputError(
            f"{path} must be named by its time and length, as in edm2-img512-s-2147483-0.130.pkl, got neither: "
            "add --nimg and --sigma-rel"
        )
    nimg = images_seen(int(named[1])) if nimg is None and named else int(nimg or 0)
    length = Length.of(float(named[2]) if sigma_rel is None and named else float(sigma_rel or 0))
    content = inert_pickle.load(path)
    network = _network(path, content)
    config, file = _config(path, network), OfficialFile(path, dict(_arrays(network)))
    try:
        check_parameters(config, file.entries)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    constants = frozenset(name for name, parameter in plan(config).parameters.items() if not parameter.trained)
    data = _data(path, content.get("encoder"), config.img_channels)
    return Metadata(config=config, nimg=nimg, length=length, kept=constants, data=data), file


def _data(path: Path, encoder: Any, channels: int) -> DataFormat | None:
    """What the network's data are, by the encoder in its file; None where the file does not say."""
    if not isinstance(encoder, Module):
        return None
    if encoder.class_name == "StandardRGBEncoder":
        return DataFormat()
    if encoder.class_name != "StabilityVAEEncoder":
        raise InputError(f"{path} must have an encoder of pixels or of Stability's latents, got {encoder.class_name}")
    try:
        return DataFormat(codec=_latents(encoder.state, channels))
    except (InputError, TypeError, ValueError, KeyError, AttributeError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{path} must have an encoder with scale and bias, got a fault: {why}") from error


def _latents(state: Mapping[str, Any], channels: int) -> Codec:
    """The codec after which x = value * scale + bias."""
    scale, bias = (np.asarray(_array(state[name]), np.float64).reshape(-1) for name in ("scale", "bias"))
    if len(scale) != channels or len(bias) != channels:
        raise ValueError(f"{len(scale)} scales for {channels} channels")
    name = str(state.get("vae_name") or state.get("_init_kwargs", {}).get("vae_name") or "stabilityai/sd-vae-ft-mse")
    numbers = {"mean": tuple((-bias / scale).tolist()), "scale": tuple((1 / scale).tolist())}
    return Codec(stored="moments", vae=name, **numbers)


def _array(value: Any) -> Any:
    return value.array if isinstance(value, Values) else value


class OfficialFile(FileReader):
    """The arrays of an official pickle, in place; a :class:`~.safetensors_io.Reader`."""

    def __init__(self, path: Path, arrays: Mapping[str, Stored]) -> None:
        super().__init__(path, {name: stored.entry for name, stored in arrays.items()})
        self._small = {name: s.values for name, s in arrays.items() if s.values is not None}

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        """See :meth:`~.safetensors_io.FileReader.fill`."""
        if name in self._small:
            out[:] = self._small[name][start : start + out.size]
        else:
            super().fill(out, name, start)


def _network(path: Path, content: Any) -> Module:
    network = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(network, Module) or network.class_name != "Precond":
        got = network.class_name if isinstance(network, Module) else f"a {type(network).__name__}"
        raise InputError(f"{path} must hold an EDM2 network called ema, a Precond, got {got}: choose another file")
    return network


def _arrays(module: Module, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    for kind in ("_parameters", "_buffers"):
        for name, array in module.part(kind).items():
            if isinstance(array, Stored):
                yield f"{prefix}{name}", array
    for name, inner in module.part("_modules").items():
        if isinstance(inner, Module):
            yield from _arrays(inner, f"{prefix}{name}.")


def _config(path: Path, network: Module) -> NetworkConfig:
    """The config by the constructor arguments of the network and of its UNet, and by their attributes; for the rest the
    defaults, which are the official ones."""
    unet = network.part("_modules").get("unet")
    modules = [module for module in (unet, network) if isinstance(module, Module)]
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
