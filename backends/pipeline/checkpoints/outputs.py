"""Reconstructed averages in files: written while they are computed, all or nothing, and resumed after a kill.

Each output grows in a hidden file, ``.NAME.partial``, beside a journal of how many blocks have reached the disk; it is
renamed when it is complete. The same job again skips complete outputs and resumes partial ones.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .atomic import sync_folder, write_bytes, write_error
from .checksums import PIECE, of_array
from .combination import Block, Combination
from .reconstruct import block_size, compute_blocks
from .safetensors_io import DTYPES, FileReader, layout, read_array, read_header
from .snapshots import metadata_text, snapshot_name, tracked_name
from .storage import LARGEST, StorageDtype, fitting_dtype, narrowed

MADE_FROM = "made_from"
_JOURNAL, _LOCK = ".reconstruct.json", ".reconstruct.lock"
_NAMES: dict[str, StorageDtype] = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {"float64": "F32", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_JOURNAL_EVERY = 10.0  # seconds
_FLUSH_EVERY = 0.1  # seconds
_SUMMED = 64 * PIECE  # elements that are read at a time for their checksums


@dataclass(frozen=True)
class Output:
    """A snapshot to be written: its path, its length, and a digest of everything that determines its content."""

    path: Path
    sigma_rel: float
    made_from: str

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


def plan_outputs(
    folder: Path, combination: Combination, /, *, dtype: StorageDtype
) -> tuple[list[Output], list[Output]]:
    """(outputs to be made, outputs that exist) for the lengths of ``combination``.

    Raises:
        InputError: two lengths share a file name, or a file of such a name has other content.
    """
    name = snapshot_name if combination.config else tracked_name
    stats = [source.path.stat() for source in combination.sources]
    files = [
        [source.path.name, source.time, source.length.key, stat.st_size, stat.st_mtime_ns]
        for source, stat in zip(combination.sources, stats, strict=True)
    ]
    todo: dict[Path, Output] = {}
    existing = []
    for sigma_rel in combination.sigma_rels:
        path = folder / name(combination.time, Length.of(sigma_rel))
        text = json.dumps([files, combination.time, sigma_rel, combination.overrides, dtype])
        output = Output(path, sigma_rel, hashlib.sha256(text.encode()).hexdigest())
        if path in todo:
            raise InputError(f"lengths must differ in their first three digits, got {path.name} twice: drop one")
        if not path.exists():
            todo[path] = output
        elif _made_from(path) == output.made_from:
            existing.append(output)
        else:
            raise InputError(
                f"outputs must not take another's place, got {path} made otherwise: choose another --outdir"
            )
    return list(todo.values()), existing


def _made_from(path: Path) -> str | None:
    try:
        return read_header(path)[1].get(MADE_FROM)
    except InputError:
        return None


class Writer:
    """Computes ``outputs``, some or all of the averages of ``combination``, into their files.

    Use it as a context manager: entering opens or resumes the partial files, :meth:`run` does the work, and
    :meth:`finish` renames them. ``done`` counts blocks, of ``total``.
    """

    def __init__(
        self, outputs: Sequence[Output], combination: Combination, /, *, dtype: StorageDtype, memory: int
    ) -> None:
        self._outputs, self._folder = list(outputs), outputs[0].path.parent
        self._combination = combination.only([output.sigma_rel for output in outputs])
        self._memory, size = memory, block_size(self._combination, memory=memory)
        self._sizes = [block.stop - block.start for block in self._combination.blocks(size)]
        self.total, self.done = len(self._sizes), 0
        entries = self._combination.entries
        self._kinds = {name: (_stored(self._combination, name, dtype), entry.shape) for name, entry in entries.items()}
        self._texts = [_metadata(output, self._combination) for output in self._outputs]
        self._layouts = [layout(self._kinds, text) for text in self._texts]
        key = "".join([*(output.made_from for output in outputs), str(size)])
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self._descriptors: list[int] = []
        self._lock = FileLock(self._folder / _LOCK)
        self._flushing = ThreadPoolExecutor(1)
        self._complete = Event()

    @property
    def elements(self) -> tuple[int, int]:
        """Elements of one average that are done, and in total."""
        return sum(islice(self._sizes, self.done)), sum(self._sizes)

    def __enter__(self) -> "Writer":
        """Open the partial files, resume them if the journal is of this very job, and reserve space for the rest.

        Raises:
            InputError: another process writes averages into the folder, or has just written one of these; no space.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._be_alone()
            self.done = self._journalled()
            for output, (header, entries) in zip(self._outputs, self._layouts, strict=True):
                size = len(header) + sum(entry.nbytes for entry in entries.values())
                self._descriptors.append(os.open(output.partial, os.O_RDWR | os.O_CREAT, 0o644))
                os.ftruncate(self._descriptors[-1], size)
                _reserve(self._descriptors[-1], size)
                _write_all(self._descriptors[-1], header, 0)
            self._flushed = self._flushing.submit(self._flush)
        except OSError as error:
            self._close()
            self._discard()
            raise write_error(self._folder / self._outputs[0].path.name, error) from error
        return self

    def _be_alone(self) -> None:
        """Lock the folder until the files are closed, where the file system has locks."""
        try:
            self._lock.acquire(blocking=False)
        except NotImplementedError:
            pass
        except Timeout:
            raise InputError(
                f"one process at a time may write averages into a folder, got {self._folder}, into which another "
                "writes: wait for it, or choose another --outdir"
            ) from None
        for output in self._outputs:
            if output.path.exists():
                self._close()
                raise InputError(
                    f"outputs must be new, got {output.path}, which another process has written: run again"
                )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Keep the partial files if the job was stopped; delete them if its input was at fault."""
        self._close()
        if isinstance(error, InputError):
            self._discard()

    def run(self, stop: Callable[[], bool], /) -> Iterator[tuple[int, bool]]:
        """Compute the remaining blocks until ``stop()`` is true.

        After each, yield its number of elements and whether the journal was written, which happens every ten seconds
        and before stopping.

        Raises:
            InputError: as :func:`~.reconstruct.compute_blocks`, a value beyond the dtype, or a failed write.
        """
        written = time.monotonic()
        for elements in compute_blocks(self._combination, self._write, memory=self._memory, skip=self.done):
            self.done += 1
            stopping = stop()
            due = stopping or time.monotonic() - written > _JOURNAL_EVERY
            if due:
                self._write_journal()
                written = time.monotonic()
            yield elements, due
            if stopping:
                return

    def _write(self, block: Block, values: np.ndarray) -> None:
        """Write values [n_out, elements] of a block; called from any thread."""
        kind, stored = self._kinds[block.name][0], values
        if self._combination.averaged(block.name):
            dtype = _NAMES[kind]
            if (largest := max(values.max(), -values.min())) > LARGEST[dtype]:
                raise InputError(
                    f"values of {block.name} must be within {LARGEST[dtype]:g}, got {largest:g}: use --dtype float32"
                )
            stored = narrowed(values, dtype)
        at = block.start * DTYPES[kind].itemsize
        try:
            for descriptor, (_, entries), row in zip(self._descriptors, self._layouts, stored, strict=True):
                _write_all(descriptor, np.ascontiguousarray(row).view(np.uint8).data, entries[block.name].offset + at)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error

    def finish(self) -> list[Path]:
        """Rename the complete files. Returns their paths."""
        self._complete.set()
        self._seal()
        self._sync()
        try:
            for output in self._outputs:
                os.replace(output.partial, output.path)
            sync_folder(self._folder)
            (self._folder / _JOURNAL).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error
        return [output.path for output in self._outputs]

    def _seal(self) -> None:
        """Put the checksums of the arrays into the headers."""
        for output, (_, entries), text, descriptor in zip(
            self._outputs, self._layouts, self._texts, self._descriptors, strict=True
        ):
            reader = FileReader(output.partial, entries)
            header, _ = layout(self._kinds, text, sums={name: _sums(reader, name) for name in entries})
            try:
                _write_all(descriptor, header, 0)
            except OSError as error:
                raise write_error(output.path, error) from error

    def _write_journal(self) -> None:
        self._sync()
        write_bytes(self._folder / _JOURNAL, json.dumps({"key": self._key, "done": self.done}).encode())

    def _journalled(self) -> int:
        """The number of blocks done, if the journal is of this job and its files exist."""
        try:
            journal = parse_json((self._folder / _JOURNAL).read_bytes())
            same = journal["key"] == self._key and all(output.partial.exists() for output in self._outputs)
            return int(journal["done"]) if same else 0
        except (OSError, KeyError, TypeError, ValueError):
            return 0

    def _flush(self) -> None:
        """Flush the files to the disk while others write to them, so that little is left to wait for at the end."""
        while not self._complete.wait(_FLUSH_EVERY):
            for descriptor in self._descriptors:
                getattr(os, "fdatasync", os.fsync)(descriptor)

    def _sync(self) -> None:
        """Wait until all that was written is on the disk. Raises InputError if any write failed, earlier ones too."""
        try:
            if self._complete.is_set() or self._flushed.done():
                self._flushed.result()
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise write_error(self._outputs[0].path, error) from error

    def _close(self) -> None:
        self._complete.set()
        self._flushing.shutdown()
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._lock.is_locked:
            (self._folder / _LOCK).unlink(missing_ok=True)
            self._lock.release()

    def _discard(self) -> None:
        for output in self._outputs:
            output.partial.unlink(missing_ok=True)
        (self._folder / _JOURNAL).unlink(missing_ok=True)


def _metadata(output: Output, combination: Combination) -> dict[str, str]:
    """The metadata of the file of ``output``."""
    own = replace(combination.latest.metadata, nimg=combination.time, length=Length.of(output.sigma_rel))
    overrides = {"overrides": json.dumps(combination.overrides)} if combination.overrides else {}
    return metadata_text(own) | {MADE_FROM: output.made_from} | overrides


def _sums(reader: FileReader, name: str) -> str:
    """The checksums of the array called ``name``, which is read in parts."""
    entry, sums = reader.entries[name], []
    for start in range(0, entry.size, _SUMMED):
        part = np.empty(min(_SUMMED, entry.size - start), DTYPES[entry.dtype])
        reader.fill(part, name, start)
        sums.append(of_array(part))
    return "".join(sums)


def _stored(combination: Combination, name: str, dtype: StorageDtype) -> str:
    """The file dtype of an output's array, which is chosen by the latest source: its values are of similar size."""
    if not combination.averaged(name):
        return combination.entries[name].dtype
    latest = read_array(combination.latest.reader, name).astype(np.float32, copy=False)
    return _CODES[fitting_dtype(latest, dtype)]


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the space where the system can, so that a full disk is found before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def _write_all(descriptor: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
