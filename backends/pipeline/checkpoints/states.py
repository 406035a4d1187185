"""States in files: what training resumes from, in float32 safetensors files.

``params/NAME`` the stored weights, ``adam1/NAME`` and ``adam2/NAME`` the optimizer's moments of trained parameters,
``ema/LENGTH/NAME`` each average; ``nimg`` and ``steps`` in the metadata. Each part is stored in full: none is derived
from another.

A state is one such file, or a folder of several, shards, which as many processes have written: each has some of the
arrays. The folder's index, with the keys of those on the Hugging Face hub, is written last, when all shards are whole;
it holds the checksums of their headers, which hold those of the arrays. The states of a run lie in one folder, named by
the number of images.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.ema import Length, LengthLike
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.network import NetworkConfig, check_parameters, plan
from edm2_core.state import Arrays, State

from . import checksums
from .atomic import sync_folder, write_bytes, write_error
from .safetensors_io import Entry, TensorFile, check_format, read_array, write_tensors

KIND, VERSION = "edm2-state", 1
INDEX = "state.safetensors.index.json"
_SINGLE = "state.safetensors"  # of earlier versions, which kept one state


def parts(state: State, /) -> dict[str, Arrays]:
    """The arrays of ``state`` by the prefix of their names in the file."""
    averages = {_prefix(length): arrays for length, arrays in state.averages.items()}
    return {"params": state.params, "adam1": state.moments1, "adam2": state.moments2, **averages}


def _prefix(length: Length) -> str:
    return f"ema/{length.key}"


def arrays_of(state: State, /) -> dict[str, np.ndarray]:
    """The arrays of ``state`` by their names in the file, float32."""
    return {
        f"{prefix}/{name}": np.asarray(array, np.float32)
        for prefix, part in parts(state).items()
        for name, array in part.items()
    }


def state_of(arrays: Arrays, /, *, nimg: int, steps: int) -> State:
    """The state of these :func:`arrays_of` it."""
    by_prefix: dict[str, dict[str, np.ndarray]] = {"params": {}, "adam1": {}, "adam2": {}}
    for full, array in arrays.items():
        prefix, _, name = full.rpartition("/")
        by_prefix.setdefault(prefix, {})[name] = array
    params, first, second = (by_prefix.pop(prefix) for prefix in ("params", "adam1", "adam2"))
    averages = {Length.of(prefix.removeprefix("ema/")): part for prefix, part in by_prefix.items()}
    return State(params=params, moments1=first, moments2=second, averages=averages, nimg=nimg, steps=steps)


# ---- writing


def save_state(path: Path, state: State, /) -> None:
    """Write ``state``, or a part of one, as one file, all or nothing.

    Raises:
        InputError: it fails, for lack of space for example.
    """
    metadata = {"format": KIND, "version": str(VERSION), "nimg": str(state.nimg), "steps": str(state.steps)}
    write_tensors(path, arrays_of(state), metadata)


def folder_of(states: Path, nimg: int, /) -> Path:
    """The folder, in that of a run's ``states``, of the one after ``nimg`` images."""
    return states / f"{nimg:012d}"


def shard_of(folder: Path, index: int, count: int, /) -> Path:
    """The shard ``index``, from 0 on, of ``count`` in the folder of a state."""
    return folder / f"state-{index + 1:05d}-of-{count:05d}.safetensors"


def complete(folder: Path, /, *, count: int) -> None:
    """Write the index of a state, all of whose ``count`` shards are there; with it the state is.

    Raises:
        InputError: a shard is missing or damaged, or the write fails.
    """
    shards = [TensorFile(shard_of(folder, index, count)) for index in range(count)]
    nimg, steps = _counters(shards[0])
    size = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
    index = {
        "metadata": {"format": KIND, "version": VERSION, "nimg": nimg, "steps": steps, "total_size": size},
        "weight_map": {name: shard.path.name for shard in shards for name in shard.entries},
        "headers": {shard.path.name: shard.seal for shard in shards},
    }
    write_bytes(folder / INDEX, json.dumps({**index, checksums.KEY: _sum(index)}, indent=1).encode())
    try:
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, error) from error


def store(states: Path, state: State, /) -> Path:
    """Write ``state``, whole, as one shard of its folder in ``states``; returns that."""
    folder = folder_of(states, state.nimg)
    save_state(shard_of(folder, 0, 1), state)
    complete(folder, count=1)
    return folder


def is_complete(states: Path, nimg: int, /) -> bool:
    """Whether the state after ``nimg`` images is stored in a run's folder of states."""
    return (folder_of(states, nimg) / INDEX).exists()


def remove_others(states: Path, /, *, keep: int) -> None:
    """Of the complete states in a run's folder, remove all but the last ``keep``."""
    for folder in _complete(states)[:-keep]:
        (folder / INDEX).unlink(missing_ok=True)  # first: what remains if this is stopped is no state
        shutil.rmtree(folder, ignore_errors=True)
    if _complete(states):
        (states / _SINGLE).unlink(missing_ok=True)


def remove_incomplete(states: Path, /) -> None:
    """Remove what writers that were stopped have left of states."""
    for folder in _folders(states):
        if not (folder / INDEX).exists():
            shutil.rmtree(folder, ignore_errors=True)


# ---- reading


def newest(states: Path, /) -> Path | None:
    """The last complete state in a run's folder; None if there is none."""
    found = _complete(states)
    if found:
        return found[-1]
    return states / _SINGLE if (states / _SINGLE).exists() else None


def _folders(states: Path) -> list[Path]:
    """Those of states, complete or not, in the order of their images."""
    found = [path for path in states.glob("*") if re.fullmatch(r"\d{12,16}", path.name)]
    return sorted(found, key=lambda path: int(path.name))


def _complete(states: Path) -> list[Path]:
    return [folder for folder in _folders(states) if (folder / INDEX).exists()]


@dataclass(frozen=True)
class StoredArrays(Mapping[str, np.ndarray]):
    """A part of a stored state. An array is read when it is asked for, each time: no more is in memory than what the
    reader keeps. Raises InputError where its bytes are not those that were written."""

    prefix: str
    files: Mapping[str, TensorFile]

    def __getitem__(self, name: str) -> np.ndarray:
        return read_array(self.files[name], f"{self.prefix}/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def entries(self) -> dict[str, Entry]:
        """Dtypes and shapes, without reading an array."""
        return {name: file.entries[f"{self.prefix}/{name}"] for name, file in self.files.items()}

    def digest(self, name: str) -> str:
        """:func:`~.checksums.of_array` of one, as it was written; read only from a file without checksums."""
        return self.files[name].digest(f"{self.prefix}/{name}") or checksums.of_array(self[name])


def digests(state: State, /) -> dict[str, str]:
    """The checksums of all arrays, by their names in the file."""
    return {
        f"{prefix}/{name}": part.digest(name) if isinstance(part, StoredArrays) else _digest(part[name])
        for prefix, part in parts(state).items()
        for name in part
    }


def _digest(array: np.ndarray) -> str:
    return checksums.of_array(np.ascontiguousarray(array, np.float32))


def read_counters(path: Path, /) -> tuple[int, int]:
    """(nimg, steps) of a stored state; reads no array.

    Raises:
        InputError: nothing there, cut short, too long, not a safetensors file, not a state, or a newer version.
    """
    return _counters(_files(path)[0])


def _counters(file: TensorFile) -> tuple[int, int]:
    check_format(file, kind=KIND, version=VERSION)
    try:
        return int(file.metadata["nimg"]), int(file.metadata["steps"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{file.path} must have a state's metadata, got a fault: {error}: restore it") from error


def load_state(path: Path, config: NetworkConfig, lengths: Iterable[LengthLike], /) -> State:
    """The state, in a file or folder, of a run of ``config`` that tracks averages of these lengths. Its arrays are read
    when they are asked for.

    Raises:
        InputError: as :func:`read_counters`, or the state lacks parts of such a run, or has others.
    """
    files = _files(path)
    nimg, steps = _counters(files[0])
    averages = {length: _prefix(length) for length in map(Length.of, lengths)}
    stored: dict[str, dict[str, TensorFile]] = {p: {} for p in ("params", "adam1", "adam2", *averages.values())}
    for file in files:
        for full in file.entries:
            prefix, _, name = full.rpartition("/")
            if prefix not in stored:
                raise InputError(
                    f"{path} must hold {', '.join(stored)}, got {full}: restore it, or choose another --outdir"
                )
            stored[prefix][name] = file
    arrays = {prefix: StoredArrays(prefix, names) for prefix, names in stored.items()}
    try:
        _check_parts(config, arrays)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return State(
        params=arrays["params"],
        moments1=arrays["adam1"],
        moments2=arrays["adam2"],
        averages={length: arrays[prefix] for length, prefix in averages.items()},
        nimg=nimg,
        steps=steps,
    )


def _check_parts(config: NetworkConfig, stored: Mapping[str, StoredArrays]) -> None:
    constants = {name for name, parameter in plan(config).parameters.items() if not parameter.trained}
    params = stored["params"].entries()
    for prefix, arrays in stored.items():
        whole = arrays.entries()
        if prefix.startswith("adam"):
            whole |= {name: params[name] for name in constants if name in params}
        try:
            check_parameters(config, whole)
        except InputError as error:
            raise InputError(f"{prefix}: {error}") from error


def _files(path: Path) -> list[TensorFile]:
    """Those of a state, whose index, if it has one, agrees with them."""
    if not path.is_dir():
        names, files = {}, [TensorFile(path)]
    else:
        names = _index(path / INDEX)
        files = [TensorFile(path / name) for name in names]
    for file in files:
        file.hold()
        if names and file.seal != names[file.path.name]:
            raise InputError(f"{file.path} must be the shard that {INDEX} names, got another: restore both")
    return files


def _index(path: Path) -> dict[str, str]:
    """The digits of the headers by name of the shard."""
    try:
        index: dict[str, Any] = dict(parse_json(path.read_text(encoding="utf-8")))
        headers = index["headers"]
        whole = index.pop(checksums.KEY) == _sum(index)
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got '{error.strerror}': check the path") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged_index(path) from error
    if not whole or not headers or any(Path(name).name != name for name in headers):
        raise _damaged_index(path)
    return dict(headers)


def _damaged_index(path: Path) -> InputError:
    return InputError(f"{path} must be the index that was written, got another: it is damaged, copy it again")


def _sum(index: Mapping[str, Any]) -> str:
    return checksums.digest(json.dumps(index).encode())
