"""How are reconstructed averages written while they are computed, all or nothing, and gone on with after a kill?

Each output grows under a hidden name, ``.NAME.partial``, beside a journal of how many blocks have reached the disk; it
takes its own name when it is whole. The same command again skips outputs that are there and goes on with partial ones.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import numkong
import numpy as np

from edm2_core.errors import InputError

from .atomic import write_bytes, write_error
from .reconstruct import Block, Recipe
from .safetensors_io import DTYPES, Entry, layout, read_header
from .snapshots import Metadata, snapshot_metadata

MADE_FROM = "made_from"
_JOURNAL = ".reconstruct.json"
_PAUSE = 0.1  # seconds between two rounds of sending what was written to the disk


@dataclass(frozen=True)
class Output:
    """A snapshot to be written: its path, and what identifies how it is made."""

    path: Path
    sigma_rel: float
    made_from: str

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


def plan_outputs(folder: Path, recipe: Recipe, /, *, dtype: str) -> tuple[list[Output], list[Output]]:
    """(outputs to be made, those that are there already) for the lengths of ``recipe``.

    Raises:
        InputError: two lengths share a file name, or a file of such a name was made from something else.
    """
    todo: dict[Path, Output] = {}
    there = []
    for sigma_rel in recipe.sigma_rels:
        path = folder / _name(recipe, sigma_rel)
        output = Output(path, sigma_rel, _identity(recipe, sigma_rel, dtype))
        if path in todo:
            raise InputError(f"lengths must differ in their first three digits, got {path.name} twice: drop one")
        if not path.exists():
            todo[path] = output
        elif _made_from(path) == output.made_from:
            there.append(output)
        else:
            raise InputError(
                f"outputs must not take another's place, got {path} made otherwise: choose another --outdir"
            )
    return list(todo.values()), there


def _name(recipe: Recipe, sigma_rel: float) -> str:
    if recipe.config is None:  # not ours: the clock may count steps
        return f"{recipe.time:012d}-{sigma_rel:.3f}.safetensors"
    return f"{recipe.time // 1000:07d}-{sigma_rel:.3f}.safetensors"


def _identity(recipe: Recipe, sigma_rel: float, dtype: str) -> str:
    """A digest of all that decides what the output is; files count by name, size and date."""
    stats = [source.path.stat() for source in recipe.sources]
    files = [
        [source.path.name, source.time, source.sigma_rel, source.half_life, stat.st_size, stat.st_mtime_ns]
        for source, stat in zip(recipe.sources, stats, strict=True)
    ]
    text = json.dumps([files, recipe.time, sigma_rel, recipe.overrides, dtype])
    return hashlib.sha256(text.encode()).hexdigest()


def _made_from(path: Path) -> str | None:
    try:
        return read_header(path)[1].get(MADE_FROM)
    except InputError:
        return None


class Writer:
    """Writes ``outputs``, row k of each block to the k-th, and keeps count. Enter it before the first block."""

    def __init__(self, outputs: Sequence[Output], recipe: Recipe, /, *, dtype: str, block_size: int) -> None:
        self._outputs, self._folder = list(outputs), outputs[0].path.parent
        self._entries: Mapping[str, Entry] = {}
        self._headers = []
        stored = {name: _stored(entry, dtype) for name, entry in recipe.sources[0].reader.entries.items()}
        for output in outputs:
            own = Metadata(config=recipe.config, nimg=recipe.time, sigma_rel=output.sigma_rel)
            text = snapshot_metadata(own) | {MADE_FROM: output.made_from}
            if recipe.overrides:
                text["overrides"] = json.dumps(recipe.overrides)
            header, self._entries = layout(stored, text)
            self._headers.append(header)
        # headers are of different lengths, so places count from their ends
        self._starts = [len(header) for header in self._headers]
        self._entries = {n: replace(e, offset=e.offset - self._starts[-1]) for n, e in self._entries.items()}
        self._key = hashlib.sha256("".join([*(o.made_from for o in outputs), str(block_size)]).encode()).hexdigest()
        self._descriptors: list[int] = []
        self._flushing = ThreadPoolExecutor(1)
        self._whole = Event()
        self.done = 0

    def __enter__(self) -> "Writer":
        """Open partial files, go on with them if their journal is of this very job, and make room for the rest."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.done = self._journalled()
            size = sum(entry.nbytes for entry in self._entries.values())
            for output, header in zip(self._outputs, self._headers, strict=True):
                self._descriptors.append(os.open(output.partial, os.O_RDWR | os.O_CREAT, 0o644))
                os.ftruncate(self._descriptors[-1], len(header) + size)
                _reserve(self._descriptors[-1], len(header) + size)
                _write_all(self._descriptors[-1], header, 0)
            self._flushed = self._flushing.submit(self._flush)
        except OSError as error:
            self._close()
            self._discard()
            raise write_error(self._folder / self._outputs[0].path.name, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Keep what was computed if the job was stopped; remove it if its input was at fault."""
        self._close()
        if isinstance(error, InputError):
            self._discard()

    def write(self, block: Block, values: np.ndarray) -> None:
        """Put values [n_out, elements] of a block where they belong; called from any thread.

        Raises:
            InputError: a value that the dtype cannot hold, or no room.
        """
        entry = self._entries[block.name]
        dtype = DTYPES[entry.dtype]
        if entry.floating and (largest := max(values.max(), -values.min())) > np.finfo(dtype).max:
            raise InputError(
                f"values of {block.name} must be within {np.finfo(dtype).max:g}, got {largest:g}: use --dtype float32"
            )
        if dtype == np.float16:
            stored = np.asarray(numkong.astype(values, "float16"))  # to nearest even, as NumPy, 40 times as fast
        else:
            stored = values.astype(dtype, order="C")
        at = entry.offset + block.start * dtype.itemsize
        try:
            for descriptor, start, row in zip(self._descriptors, self._starts, stored, strict=True):
                _write_all(descriptor, memoryview(row).cast("B"), start + at)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error

    def checkpoint(self, done: int) -> None:
        """Note that the first ``done`` blocks are on the disk."""
        self._sync()
        note = json.dumps({"key": self._key, "done": done}).encode()
        write_bytes(self._folder / _JOURNAL, note)
        self.done = done

    def finish(self) -> list[Path]:
        """Give every output its name, whole as it is now. Returns their paths."""
        self._whole.set()
        self._sync()
        try:
            for output in self._outputs:
                os.replace(output.partial, output.path)
            (self._folder / _JOURNAL).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error
        return [output.path for output in self._outputs]

    def _journalled(self) -> int:
        """How many blocks are done, if the journal is this job's and its files are all there."""
        try:
            note = json.loads((self._folder / _JOURNAL).read_bytes())
            same = note["key"] == self._key and all(output.partial.exists() for output in self._outputs)
            return int(note["done"]) if same else 0
        except (OSError, KeyError, TypeError, ValueError):
            return 0

    def _flush(self) -> None:
        """Send to the disk what others write, until all is written: little is left to wait for then."""
        while not self._whole.wait(_PAUSE):
            for descriptor in self._descriptors:
                getattr(os, "fdatasync", os.fsync)(descriptor)

    def _sync(self) -> None:
        """Return when all that was written is on the disk. Raises InputError where it could not be, now or earlier."""
        try:
            if self._whole.is_set() or self._flushed.done():
                self._flushed.result()
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error

    def _close(self) -> None:
        self._whole.set()
        self._flushing.shutdown()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _discard(self) -> None:
        for output in self._outputs:
            output.partial.unlink(missing_ok=True)
        (self._folder / _JOURNAL).unlink(missing_ok=True)


def _stored(entry: Entry, dtype: str) -> tuple[str, tuple[int, ...]]:
    """As snapshots are stored: single numbers, which are gains, in float32 whatever the others are in."""
    if not entry.floating:
        return entry.dtype, entry.shape
    return ("F32" if not entry.shape or dtype == "float32" else "F16"), entry.shape


def _reserve(descriptor: int, size: int) -> None:
    """Take the room now, where the system can, so that a full disk is found before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def _write_all(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
