"""Training states in the checkpoints of other engines: PyTorch's distributed ones (DCP) and orbax.

Names are those of snapshots, layouts canonical. In DCP they lie as ``get_state_dict`` of PyTorch has them, ``ema`` and
``edm2`` beside: ``model.NAME``, ``optimizer.state.NAME.{exp_avg,exp_avg_sq,step}``, ``ema.LENGTH.NAME``,
``edm2.{nimg,steps,config}``. In orbax: ``params``, ``opt_state`` of ``mu`` and ``nu``, ``averages`` of LENGTH,
``nimg``, ``steps``, ``config``. ``config`` is the text of a run's config.json, as bytes.
"""

import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters, plan
from edm2_core.state import State

from .atomic import write_error
from .inert_pickle import check_memo

Engine = Literal["dcp", "orbax"]
Read = Callable[[str], np.ndarray]
_MARKS: dict[Engine, str] = {"dcp": ".metadata", "orbax": "_CHECKPOINT_METADATA"}  # files that only these have
_PLACES: dict[Engine, dict[str, str]] = {
    "dcp": {
        "params": "model.{name}",
        "adam1": "optimizer.state.{name}.exp_avg",
        "adam2": "optimizer.state.{name}.exp_avg_sq",
        "averages": "ema.{length}.{name}",
        "adam_steps": "optimizer.state.{name}.step",
        **{key: f"edm2.{key}" for key in ("nimg", "steps", "config")},
    },
    "orbax": {
        "params": "params/{name}",
        "adam1": "opt_state/mu/{name}",
        "adam2": "opt_state/nu/{name}",
        "averages": "averages/{length}/{name}",
        "adam_steps": "opt_state/count",
        **{key: key for key in ("nimg", "steps", "config")},
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """Arrays of a checkpoint: which there are, by their full names, and how one is read."""

    path: Path
    engine: Engine
    names: frozenset[str]
    read: Read

    def place(self, part: str, **of: str) -> str:
        """The full name of ``part``, of a parameter ``name`` and ``length`` where that has them."""
        return _PLACES[self.engine][part].format(**of)

    def number(self, part: str, **of: str) -> int | None:
        """A counter; None if there is none."""
        return int(self.read(name)) if (name := self.place(part, **of)) in self.names else None

    def steps(self, config: NetworkConfig) -> int | None:
        """The steps that Adam has taken; None if nothing says."""
        own = self.number("steps")
        return self.number("adam_steps", name=_trained(config)[0]) if own is None else own

    def config(self) -> str | None:
        """The text of the run's config.json; None if there is none."""
        name = self.place("config")
        return self.read(name).astype(np.uint8).tobytes().decode() if name in self.names else None

    def state(
        self, config: NetworkConfig, lengths: Iterable[Length], *, nimg: int, steps: int, missing_fresh: bool = False
    ) -> tuple[State, set[str]]:
        """The state of a run of ``config`` that tracks averages of these lengths, and the arrays that are not part of
        it. ``missing_fresh``: moments or averages that are missing are those of a new run.

        Raises:
            InputError: weights, moments or averages are missing, or of other shapes.
        """
        table, used = plan(config).parameters, set[str]()

        def part(kind: str, names: Iterable[str], instead: Callable[[str], np.ndarray], **of: str) -> dict[str, Any]:
            places = {name: self.place(kind, name=name, **of) for name in names}
            lacking = [place for place in places.values() if place not in self.names]
            if len(lacking) == len(places) and missing_fresh and kind != "params":
                return {name: instead(name) for name in places}
            if lacking:
                hint = "" if kind == "params" else ", or let them begin anew with --missing-fresh"
                raise InputError(f"{self.path} must hold {lacking[0]}, got none: save it with the others{hint}")
            used.update(places.values())
            return {name: np.asarray(self.read(place), np.float32) for name, place in places.items()}

        trained = _trained(config)
        params = part("params", table, lambda name: np.zeros(0))
        state = State(
            params=params,
            moments1=part("adam1", trained, lambda name: np.zeros_like(params[name])),
            moments2=part("adam2", trained, lambda name: np.zeros_like(params[name])),
            averages={
                length: part("averages", table, lambda name: params[name], length=length.key) for length in lengths
            },
            nimg=nimg,
            steps=steps,
        )
        constants = {name: array for name, array in params.items() if name not in trained}
        moments = ({**part, **constants} for part in (state.moments1, state.moments2))
        for arrays in (params, *state.averages.values(), *moments):
            check_parameters(config, arrays)
        known = {self.place(key) for key in ("nimg", "steps", "config")}
        known |= {self.place("adam_steps", name=name) for name in trained}
        return state, set(self.names) - used - known


def _trained(config: NetworkConfig) -> list[str]:
    return [name for name, parameter in plan(config).parameters.items() if parameter.trained]


def recognised(path: Path, /) -> Engine | None:
    """The engine that has written the folder ``path``; None: neither."""
    return next((engine for engine, mark in _MARKS.items() if (path / mark).exists()), None)


def open_checkpoint(path: Path, /) -> Checkpoint:
    """Raises InputError if the folder is no checkpoint that can be read, or its engine's package is missing."""
    engine = recognised(path)
    if engine is None:
        marks = " nor ".join(_MARKS.values())
        raise InputError(f"{path} must be a checkpoint of DCP or orbax, got a folder with neither {marks}")
    with _errors_of(engine, path):
        names, read = _open_dcp(path) if engine == "dcp" else _open_orbax(path)

    def whole(name: str) -> np.ndarray:
        with _errors_of(engine, path):
            return read(name)

    return Checkpoint(path, engine, frozenset(names), whole)


@contextmanager
def _errors_of(engine: Engine, path: Path) -> Iterator[None]:
    """Within it, errors of an engine become one InputError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except ModuleNotFoundError as error:
        extra = {"dcp": "torch", "orbax": "orbax"}[engine]
        raise InputError(
            f"checkpoints of {engine} need {error.name}, which is not installed: pip install 'edm2[{extra}]'"
        ) from error
    except BaseException as error:  # of many classes, and DCP's own is no Exception
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # DCP's first lines are a traceback
        raise InputError(f"{path} must be a whole checkpoint of {engine}, got '{why:.160}': copy it again") from error


@contextmanager
def _unheard_tasks() -> Iterator[None]:
    """Within it, and after an error, nothing is printed by tasks that orbax leaves to other threads when it fails: each
    would print a traceback, at any time until the end of the process."""
    log, hook, unraisable = logging.getLogger("asyncio"), sys.excepthook, sys.unraisablehook
    heard = log.disabled
    log.disabled = True
    sys.excepthook = lambda kind, error, trace: None if _of_closed_loop(error) else hook(kind, error, trace)
    sys.unraisablehook = lambda told: None if _of_closed_loop(told.exc_value) else unraisable(told)
    yield
    log.disabled, sys.excepthook, sys.unraisablehook = heard, hook, unraisable


def _of_closed_loop(error: BaseException | None) -> bool:
    return "Event loop is closed" in str(error)


def write_checkpoint(path: Path, engine: Engine, state: State, /, *, config: str) -> None:
    """Write ``state``, whole, and the text of its run's config.json. Raises InputError if the folder exists, or
    cannot be made."""
    if path.exists():
        raise InputError(f"a checkpoint must become a new folder, got {path}, which exists: choose another")
    flat = _flat(engine, state, config)
    try:
        path.mkdir(parents=True)
        if engine == "orbax":
            path.rmdir()  # it makes the folder itself, at the end
    except OSError as error:
        raise write_error(path, error) from error
    with _errors_of(engine, path):
        _write_dcp(path, flat) if engine == "dcp" else _write_orbax(path, flat)


def _flat(engine: Engine, state: State, config: str) -> dict[tuple[str, ...], np.ndarray]:
    """The arrays by the path of their keys."""
    averages: dict[tuple[str, str], np.ndarray]
    clock: dict[str, np.ndarray]
    text = np.frombuffer(config.encode(), np.uint8)
    clock = {"nimg": np.array(state.nimg, np.int64), "steps": np.array(state.steps, np.int64), "config": text}
    averages = {(length.key, name): array for length, part in state.averages.items() for name, array in part.items()}
    if engine == "orbax":
        return {
            **{("params", name): array for name, array in state.params.items()},
            **{("opt_state", "mu", name): array for name, array in state.moments1.items()},
            **{("opt_state", "nu", name): array for name, array in state.moments2.items()},
            **{("averages", *path): array for path, array in averages.items()},
            **{(key,): array for key, array in clock.items()},
        }
    moments = {"exp_avg": state.moments1, "exp_avg_sq": state.moments2}
    moments["step"] = dict.fromkeys(state.moments1, np.asarray(state.steps, np.float32))
    return {
        **{("model", name): array for name, array in state.params.items()},
        **{("optimizer", "state", name, key): array for key, part in moments.items() for name, array in part.items()},
        **{("ema", *path): array for path, array in averages.items()},
        **{("edm2", key): array for key, array in clock.items()},
    }


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*path, last), value in flat.items():
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


# ---- PyTorch's distributed checkpoints


_METADATA = {  # what the index of a checkpoint is made of
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "PurePath", "Path", "WindowsPath", "PureWindowsPath"),
    "collections": ("OrderedDict",),
    "torch": ("Size", "device"),
}
_LARGEST_METADATA = 1 << 28  # bytes


class _Metadata(pickle.Unpickler):
    """Reads the index of a checkpoint, a pickle of plain data, and constructs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _METADATA.get(module, ()):
            raise InputError(
                f"the index of a checkpoint must hold names and shapes, got {module}.{name}: it is refused"
            )
        return super().find_class(module, name)


def _open_dcp(path: Path) -> tuple[Iterable[str], Read]:
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index = path / _MARKS["dcp"]
            if index.stat().st_size > _LARGEST_METADATA:
                raise InputError(f"{index} must have at most {_LARGEST_METADATA} bytes, got more")
            with open(index, "rb") as file:
                check_memo(file)
                return _Metadata(file).load()

    entries = Reader(path).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "size")}

    def read(name: str) -> np.ndarray:
        whole = torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)
        load({name: whole}, storage_reader=Reader(path), no_dist=True)
        return np.asarray((whole.float() if whole.is_floating_point() else whole).numpy())

    return tensors, read


def _write_dcp(path: Path, flat: Mapping[tuple[str, ...], np.ndarray]) -> None:
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, save

    tensors = {key: torch.from_numpy(np.array(array)) for key, array in flat.items()}
    save(_nested(tensors), storage_writer=FileSystemWriter(path), no_dist=True)


# ---- orbax


def _open_orbax(path: Path) -> tuple[Iterable[str], Read]:
    from orbax import checkpoint as ocp

    with _unheard_tasks(), ocp.PyTreeCheckpointer() as opened:
        tree = opened.metadata(path.absolute()).item_metadata.tree
        entries = _leaves(tree)

    @cache  # at once: one after another takes orbax much longer
    def arrays() -> dict[str, Any]:
        how = _nested({keys: ocp.RestoreArgs(restore_type=np.ndarray) for keys in entries})
        with _unheard_tasks(), ocp.PyTreeCheckpointer() as opened:
            restored = opened.restore(path.absolute(), restore_args=how)
        return {"/".join(keys): leaf for keys, leaf in _leaves(restored).items()}

    return ["/".join(keys) for keys in entries], lambda name: np.asarray(arrays()[name])


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {key: leaf for name, node in tree.items() for key, leaf in _leaves(node, (*path, str(name))).items()}


def _write_orbax(path: Path, flat: Mapping[tuple[str, ...], np.ndarray]) -> None:
    from orbax import checkpoint as ocp

    with ocp.StandardCheckpointer() as writer:
        writer.save(path.absolute(), _nested(flat))
        writer.wait_until_finished()
