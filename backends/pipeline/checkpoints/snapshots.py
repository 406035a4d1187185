"""How is one network kept on disk, in one format for all ports: train in one framework, sample in another?

A snapshot is a safetensors file. Floating-point arrays are float16, gains (0-d) float32, all else as it is. The
metadata, all text: ``format`` "edm2-snapshot", ``version``, ``nimg``, ``sigma_rel`` and, of a traditional average,
``half_life`` in its place (both empty for raw weights), and ``config``, the NetworkConfig in JSON ("null" for a network
that is not ours: then any names and shapes will do).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edm2_core.ema import HalfLife
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .safetensors_io import TensorFile, checked_metadata, write_tensors

KIND, VERSION = "edm2-snapshot", 1
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What is known of a snapshot before its arrays are read. ``sigma_rel`` may be a HalfLife; None: the raw weights,
    no average. ``config`` None: the parameters of someone else's network."""

    config: NetworkConfig | None
    nimg: int
    sigma_rel: float | None

    @property
    def network(self) -> NetworkConfig:
        """The config, for who needs one. Raises InputError where there is none."""
        if self.config is None:
            raise InputError(
                "a network must be one of edm2's, got another one's parameters: choose a snapshot of a run"
            )
        return self.config


@dataclass(frozen=True, kw_only=True)
class Snapshot(Metadata):
    """A network: canonical float32 parameters, after ``nimg`` images, averaged over ``sigma_rel`` of them."""

    params: Mapping[str, np.ndarray]


def snapshot_name(nimg: int, sigma_rel: float, /) -> str:
    """The file name, in thousands of images. Of two snapshots with one name the later takes its place."""
    return f"{nimg // 1000:07d}-{_length_text(sigma_rel, 1000)}.safetensors"


def _length_text(length: float, unit: int) -> str:
    return f"h{length / unit:.10g}" if isinstance(length, HalfLife) else f"{length:.3f}"


def save_snapshot(path: str | Path, snapshot: Snapshot, /) -> None:
    """Write ``snapshot``, all or nothing.

    Raises:
        InputError: parameters other than the config's, a value that float16 cannot hold, or no room.
    """
    if snapshot.config is not None:
        check_parameters(snapshot.config, snapshot.params)
    arrays = {name: _stored(name, np.asarray(array)) for name, array in snapshot.params.items()}
    write_tensors(Path(path), arrays, snapshot_metadata(snapshot))


def snapshot_metadata(snapshot: Metadata, /) -> dict[str, str]:
    """The text that a file of this snapshot carries."""
    length = "" if snapshot.sigma_rel is None else repr(float(snapshot.sigma_rel))
    traditional = isinstance(snapshot.sigma_rel, HalfLife)
    return {
        "format": KIND,
        "version": str(VERSION),
        "nimg": str(snapshot.nimg),
        "sigma_rel": "" if traditional else length,
        "half_life": length if traditional else "",
        "config": json.dumps(snapshot.config and snapshot.config.to_json()),
    }


def save_averages(
    folder: str | Path, averages: Iterable[tuple[float, Mapping[str, np.ndarray]]], /, *, time: int
) -> list[Path]:
    """Write a snapshot of each of ``averages``, pairs of a length and its arrays, into ``folder``; return their paths.

    The averages of a network that is not ours, at ``time`` on whatever clock. They may be made one by one: no more
    than one is held.

    Raises:
        InputError: before the first update, two lengths with one file name, or as :func:`save_snapshot`.
    """
    if time <= 0:
        raise InputError(f"averages must be of a time above 0, got {time}: save them after an update")
    paths: list[Path] = []
    for sigma_rel, params in averages:
        path = Path(folder) / f"{time:012d}-{_length_text(sigma_rel, 1)}.safetensors"  # in full: clocks may count steps
        if path in paths:
            raise InputError(
                f"lengths must differ in their third digit to be stored, got {sigma_rel} besides {path.name}: "
                "track lengths farther apart, such as 0.05 and 0.10"
            )
        save_snapshot(path, Snapshot(params=params, config=None, nimg=time, sigma_rel=sigma_rel))
        paths.append(path)
    return paths


def _stored(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if array.ndim == 0:
        return array.astype(np.float32)
    largest = np.abs(array).max(initial=0)
    if not largest <= _LARGEST:  # so written, NaN fails too
        raise InputError(
            f"values of a snapshot must be within +-{_LARGEST:.0f}, got {largest:g} in {name}: "
            "training has diverged, go back to an earlier state with a smaller --lr"
        )
    return array.astype(np.float16)


def read_metadata(path: str | Path, /) -> Metadata:
    """What a snapshot is, without reading its arrays; their sizes are checked.

    Raises:
        InputError: no such file, cut short, too long, no safetensors file, no snapshot, or a newer version.
    """
    return metadata_of(TensorFile(Path(path)))


def metadata_of(file: TensorFile, /) -> Metadata:
    """:func:`read_metadata` of a file that is open already."""
    text = checked_metadata(file.path, file.metadata, kind=KIND, version=VERSION)
    try:
        sigma_rel = float(text["sigma_rel"]) if text["sigma_rel"] else None
        if half_life := text.get("half_life"):
            sigma_rel = HalfLife(float(half_life))
        fields = json.loads(text["config"])
        config = None if fields is None else NetworkConfig(**fields)
        return Metadata(config=config, nimg=int(text["nimg"]), sigma_rel=sigma_rel)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file.path} must have a snapshot's metadata, got a fault: {error}: copy it again") from error


def load_snapshot(path: str | Path, /) -> Snapshot:
    """Read a whole snapshot; what is floating point becomes float32.

    Raises:
        InputError: as :func:`read_metadata`, or parameters other than the config's.
    """
    file = TensorFile(Path(path))
    metadata = metadata_of(file)
    params = {name: _loaded(file.read(name)) for name in file.entries}
    if metadata.config is not None:
        try:
            check_parameters(metadata.config, params)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return Snapshot(params=params, config=metadata.config, nimg=metadata.nimg, sigma_rel=metadata.sigma_rel)


def _loaded(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
