"""Snapshots: one network in a safetensors file, in one format for all ports.

Averages are stored in float16, or as asked, gains (0-d) in float32; what is not averaged is stored as it is
(:mod:`.storage`). The metadata, all text: ``format`` "edm2-snapshot", ``version``, ``nimg``, ``sigma_rel`` or
``half_life`` (the length of the average; both are empty for raw weights), ``config``, the NetworkConfig in JSON ("null"
for a network that is not edm2's, whose arrays may have any names and shapes), ``kept`` and ``complex``, the names, in
JSON, of arrays that are not averaged and of complex ones, ``data``, a DataFormat in JSON or "null". Without ``kept``
(older files) all floating-point arrays are averages.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.codec import DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.network import NetworkConfig, check_parameters, plan
from edm2_core.state import Arrays

from .safetensors_io import Reader, TensorFile, check_format, read_array, write_tensors
from .storage import StorageDtype, as_complex, stored_arrays

KIND, VERSION = "edm2-snapshot", 1


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a snapshot says about its arrays: the network (None: not edm2's), the images seen, the length of the average
    (None: raw weights), the names of arrays that are not averaged (``kept``) and of complex arrays (``pairs``), what
    other tools have recorded (``others``), and what the network's data are (``data``; None: not recorded)."""

    config: NetworkConfig | None
    nimg: int
    length: Length | None
    kept: Collection[str] = ()
    pairs: Collection[str] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    data: DataFormat | None = None

    def required_config(self) -> NetworkConfig:
        """The config. Raises InputError where the network is not edm2's."""
        if self.config is None:
            raise InputError(
                "a network must be one of edm2's, got another one's parameters: choose a snapshot of a run"
            )
        return self.config


@dataclass(frozen=True, kw_only=True)
class Snapshot(Metadata):
    """A network: ``params`` are its arrays by canonical name; averages are float32 where they are real, arrays in
    ``kept`` have their own dtype."""

    params: Arrays


def snapshot_name(nimg: int, length: Length, /) -> str:
    """The file name, in thousands of images: of two snapshots with the same name the later replaces the earlier."""
    return f"{nimg // 1000:07d}-{_length_text(length, 1000)}.safetensors"


def tracked_name(time: int, length: Length, /) -> str:
    """The file name for a network that is not edm2's, with the time in full because it may count steps."""
    return f"{time:012d}-{_length_text(length, 1)}.safetensors"


def _length_text(length: Length, unit: int) -> str:
    return f"{length.value:.3f}" if length.relative else f"h{length.value / unit:.10g}"


def save_snapshot(path: str | Path, snapshot: Snapshot, /, *, dtype: StorageDtype = "float16") -> None:
    """Write ``snapshot``, all or nothing; averages in ``dtype``, or wider where it cannot hold them.

    Raises:
        InputError: parameters that do not fit the config, weights that are not finite, or a failed write.
    """
    config, params = snapshot.config, {name: np.asarray(array) for name, array in snapshot.params.items()}
    if config is not None:
        check_parameters(config, params)
        constants = [name for name, parameter in plan(config).parameters.items() if not parameter.trained]
        snapshot = replace(snapshot, kept=constants)
    write_arrays(Path(path), snapshot, params.items(), dtype)


def write_arrays(path: Path, metadata: Metadata, params: Iterable[tuple[str, np.ndarray]], dtype: StorageDtype) -> None:
    """Write named arrays as a snapshot with ``metadata``. Raises InputError as :func:`save_snapshot`."""
    arrays, pairs = stored_arrays(params, kept=metadata.kept, dtype=dtype)
    write_tensors(path, arrays, metadata_text(replace(metadata, pairs=pairs)))


def metadata_text(snapshot: Metadata, /) -> dict[str, str]:
    """The metadata of the file of a snapshot."""
    length: dict[str, str] = {} if snapshot.length is None else {snapshot.length.kind: repr(snapshot.length.value)}
    return {
        **snapshot.others,
        "format": KIND,
        "version": str(VERSION),
        "nimg": str(snapshot.nimg),
        "sigma_rel": "",
        "half_life": "",
        **length,
        "config": json.dumps(snapshot.config and snapshot.config.to_json()),
        "kept": json.dumps(sorted(snapshot.kept)),
        "complex": json.dumps(sorted(snapshot.pairs)),
        "data": json.dumps(snapshot.data and snapshot.data.to_json()),
    }


def description(metadata: Metadata, /) -> dict[str, Any]:
    """What a file of one network beside its weights says about it, for other tools to read."""
    length = metadata.length
    return {
        "format": "edm2",
        "network": metadata.required_config().to_json(),
        "data": None if metadata.data is None else metadata.data.to_json(),
        "nimg": metadata.nimg,
        "length": None if length is None else {length.kind: length.value},
    }


def metadata_of(file: TensorFile, /) -> Metadata:
    """The metadata of an open snapshot.

    Raises:
        InputError: not a snapshot, a newer version, or arrays that do not fit the config.
    """
    check_format(file, kind=KIND, version=VERSION)
    text = file.metadata
    try:
        lengths = [Length(kind, float(text[kind])) for kind in ("half_life", "sigma_rel") if text.get(kind)]
        fields = parse_json(text["config"])
        config = None if fields is None else NetworkConfig(**fields)
        kept, pairs = (_names(text, field) for field in ("kept", "complex"))
        length = lengths[0] if lengths else None
        described = parse_json(text.get("data", "null"))
        data = None if described is None else DataFormat.from_json(described)
        metadata = Metadata(config=config, nimg=int(text["nimg"]), length=length, kept=kept, pairs=pairs, data=data)
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
    return with_params(metadata, read_params(file, metadata.kept))


def with_params(metadata: Metadata, stored: Arrays, /) -> Snapshot:
    """A snapshot of arrays as a file has them, in which complex arrays are pairs."""
    params = {name: as_complex(array) if name in metadata.pairs else array for name, array in stored.items()}
    return Snapshot(**vars(metadata) | {"params": params})


def read_params(reader: Reader, kept: Collection[str], /) -> dict[str, np.ndarray]:
    """All arrays of a file, floating-point ones as float32 unless they are in ``kept``.

    Raises:
        InputError: averages with values that are not finite, or as ``reader``.
    """
    arrays = {name: read_array(reader, name, exactly=name in kept) for name in reader.entries}
    averaged = {n for n, array in arrays.items() if n not in kept and np.issubdtype(array.dtype, np.floating)}
    for name in averaged:
        if not (np.isfinite(arrays[name].min(initial=0)) and np.isfinite(arrays[name].max(initial=0))):  # NaN is both
            raise InputError(f"{reader.path}: {name} must be finite, got other numbers: choose another snapshot")
    return {n: a.astype(np.float32) if n in averaged else a for n, a in arrays.items()}


def _names(text: Mapping[str, str], field: str) -> frozenset[str]:
    names = parse_json(text.get(field, "[]"))
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{field} that is no list of names")
    return frozenset(names)
