"""Snapshots: one network in a safetensors file, in one format for all ports.

Floating-point arrays are stored in float16, gains (0-d) in float32, all others unchanged. The metadata, all text:
``format`` "edm2-snapshot", ``version``, ``nimg``, ``sigma_rel`` or ``half_life`` (the length of the average; both are
empty for raw weights), and ``config``, the NetworkConfig in JSON ("null" for a network that is not edm2's, whose arrays
may have any names and shapes).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters
from edm2_core.state import Arrays

from .safetensors_io import Reader, TensorFile, check_format, read_array, write_tensors

KIND, VERSION = "edm2-snapshot", 1
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a snapshot says about its arrays: the network (None: not edm2's), the images seen, and the length of the
    average (None: raw weights)."""

    config: NetworkConfig | None
    nimg: int
    length: Length | None

    def required_config(self) -> NetworkConfig:
        """The config. Raises InputError where the network is not edm2's."""
        if self.config is None:
            raise InputError(
                "a network must be one of edm2's, got another one's parameters: choose a snapshot of a run"
            )
        return self.config


@dataclass(frozen=True, kw_only=True)
class Snapshot(Metadata):
    """A network: ``params`` are its arrays by canonical name, float32 where they are floating point."""

    params: Arrays


def snapshot_name(nimg: int, length: Length, /) -> str:
    """The file name, in thousands of images: of two snapshots with the same name the later replaces the earlier."""
    return f"{nimg // 1000:07d}-{_length_text(length, 1000)}.safetensors"


def tracked_name(time: int, length: Length, /) -> str:
    """The file name for a network that is not edm2's, with the time in full because it may count steps."""
    return f"{time:012d}-{_length_text(length, 1)}.safetensors"


def _length_text(length: Length, unit: int) -> str:
    return f"{length.value:.3f}" if length.relative else f"h{length.value / unit:.10g}"


def save_snapshot(path: str | Path, snapshot: Snapshot, /) -> None:
    """Write ``snapshot``, all or nothing.

    Raises:
        InputError: parameters that do not fit the config, a value beyond float16, or a failed write.
    """
    if snapshot.config is not None:
        check_parameters(snapshot.config, snapshot.params)
    arrays = {name: _stored(name, np.asarray(array)) for name, array in snapshot.params.items()}
    write_tensors(Path(path), arrays, metadata_text(snapshot))


def metadata_text(snapshot: Metadata, /) -> dict[str, str]:
    """The metadata of the file of a snapshot."""
    length: dict[str, str] = {} if snapshot.length is None else {snapshot.length.kind: repr(snapshot.length.value)}
    return {
        "format": KIND,
        "version": str(VERSION),
        "nimg": str(snapshot.nimg),
        "sigma_rel": "",
        "half_life": "",
        **length,
        "config": json.dumps(snapshot.config and snapshot.config.to_json()),
    }


def save_averages(folder: str | Path, averages: Iterable[tuple[Length, Arrays]], /, *, time: int) -> list[Path]:
    """Write one snapshot per (length, arrays) of ``averages`` into ``folder`` and return their paths.

    For trackers of networks that are not edm2's; ``time`` is in the tracker's unit. ``averages`` may be a generator: it
    is consumed one by one.

    Raises:
        InputError: ``time`` is 0, two lengths share a file name, or as :func:`save_snapshot`.
    """
    if time <= 0:
        raise InputError(f"averages must be of a time above 0, got {time}: save them after an update")
    paths: list[Path] = []
    for length, params in averages:
        path = Path(folder) / tracked_name(time, length)
        if path in paths:
            raise InputError(
                f"lengths must differ in their third digit to be stored, got {length} besides {path.name}: "
                "track lengths farther apart, such as 0.05 and 0.10"
            )
        save_snapshot(path, Snapshot(params=params, config=None, nimg=time, length=length))
        paths.append(path)
    return paths


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if array.ndim == 0:
        return array.astype(np.float32)
    largest = np.abs(array).max(initial=0)
    if not largest <= _LARGEST:  # in this form it also catches NaN
        raise InputError(
            f"values of a snapshot must be within +-{_LARGEST:.0f}, got {largest:g} in {name}: "
            "training has diverged, go back to an earlier state with a smaller --lr"
        )
    return array.astype(np.float16)


def metadata_of(file: TensorFile, /) -> Metadata:
    """The metadata of an open snapshot.

    Raises:
        InputError: not a snapshot, a newer version, or arrays that do not fit the config.
    """
    check_format(file, kind=KIND, version=VERSION)
    text = file.metadata
    try:
        lengths = [Length(kind, float(text[kind])) for kind in ("half_life", "sigma_rel") if text.get(kind)]
        fields = json.loads(text["config"])
        config = None if fields is None else NetworkConfig(**fields)
        metadata = Metadata(config=config, nimg=int(text["nimg"]), length=lengths[0] if lengths else None)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file.path} must have a snapshot's metadata, got a fault: {error}: copy it again") from error
    if config is not None:
        try:
            check_parameters(config, file.entries)
        except InputError as error:
            raise InputError(f"{file.path}: {error}") from error
    return metadata


def load_snapshot(path: str | Path, /) -> Snapshot:
    """Read a whole snapshot.

    Raises:
        InputError: as :class:`~.safetensors_io.TensorFile` and :func:`metadata_of`.
    """
    file = TensorFile(Path(path))
    metadata = metadata_of(file)
    return Snapshot(config=metadata.config, nimg=metadata.nimg, length=metadata.length, params=read_params(file))


def read_params(reader: Reader, /) -> dict[str, np.ndarray]:
    """All arrays of a file, floating-point ones as float32."""
    arrays = {name: read_array(reader, name) for name in reader.entries}
    return {n: a.astype(np.float32) if np.issubdtype(a.dtype, np.floating) else a for n, a in arrays.items()}
