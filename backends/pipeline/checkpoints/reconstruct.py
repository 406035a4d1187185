"""What would an average of another length have been? Computed from stored ones after training.

Each wanted average is a fixed combination of the stored ones (:func:`edm2_core.ema.coefficients`). All of them are
computed in one pass, block by block of each array: every file is read once, and memory holds a few blocks of each file,
however large the network and however many averages. Threads take blocks in turn, so that some read while others
compute; a block is one product of matrices in float32, on one thread, so the result does not depend on their number.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Any

import numkong
import numpy as np
from threadpoolctl import threadpool_limits

from edm2_core.ema import ReconstructionError, coefficients, reconstruction_error, sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .safetensors_io import DTYPES
from .snapshots import Snapshot
from .sources import Broken, Source, open_sources

GiB = 1 << 30
THREADS = os.cpu_count() or 1
_SAME = 1e-6  # lengths that differ by less, relatively, are one
_BLOCKS = (1 << 12, 1 << 17)  # least and most elements: less is all overhead, more leaves the cache
_PIECE = 1 << 12  # elements that are widened and summed at a time, so that they stay in the cache
_AHEAD = 2  # blocks in work per thread

Override = tuple[str, float]


def reconstruct(
    source: str | Path | Iterable[str | Path],
    /,
    *,
    nimg: int | None = None,
    sigma_rels: Sequence[float],
    overrides: Sequence[Override] = (),
    memory: int = GiB,
) -> list[Snapshot]:
    """The averages of the lengths ``sigma_rels`` after ``nimg`` images (None: at the latest snapshot), in that order.

    ``source`` is a run folder, any folder of snapshots, or their paths: averages of one network. An average that is
    stored comes as it is stored; another is the best fit by all that were stored up to ``nimg``, summed in float32
    with float64 coefficients. ``overrides`` are pairs (pattern, length) for arrays of other lengths, the last that
    matches counts. ``memory`` is what may be used besides the result, in bytes.

    Raises:
        InputError: nothing stored, ``nimg`` before the first snapshot or after the last, a length outside
            (0, 0.2887), a pattern without match, or files that are damaged or not of one network.
    """
    recipe = Recipe.of(open_sources(source), time=nimg, sigma_rels=sigma_rels, overrides=overrides)
    arrays = [recipe.empty() for _ in sigma_rels]

    def keep(block: Block, values: np.ndarray) -> None:
        for of_one, row in zip(arrays, values, strict=True):
            of_one[block.name].reshape(-1)[block.start : block.stop] = row

    for _ in run(recipe, keep, memory=memory):
        pass
    return [
        Snapshot(params=params, config=recipe.config, nimg=recipe.time, sigma_rel=float(length))
        for params, length in zip(arrays, sigma_rels, strict=True)
    ]


@dataclass(frozen=True)
class Block:
    """Elements ``start`` to ``stop`` of one flattened array."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Recipe:
    """How averages of the lengths ``sigma_rels`` at ``time`` are made of ``sources``, in order of time.

    Those after ``time`` get no weight, and are not read.
    """

    sources: tuple[Source, ...]
    time: int
    sigma_rels: tuple[float, ...]
    overrides: tuple[Override, ...] = ()

    @classmethod
    def of(
        cls,
        sources: Sequence[Source],
        /,
        *,
        time: int | None = None,
        sigma_rels: Sequence[float],
        overrides: Sequence[Override] = (),
    ) -> "Recipe":
        """Raises InputError: a time outside the sources', a length outside (0, 0.2887), a pattern without match."""
        for sigma_rel in (*sigma_rels, *(length for _, length in overrides)):
            sigma_rel_to_gamma(float(sigma_rel))
        first, last = min(source.time for source in sources), max(source.time for source in sources)
        if time is not None and not first <= time <= last:
            raise InputError(
                f"the time of an average must be from {first} to {last} images, got {time}: choose one in between"
            )
        time = last if time is None else time
        for pattern, _ in overrides:
            if not any(fnmatchcase(name, pattern) for name in sources[0].reader.entries):
                raise InputError(f"an override must match an array, got {pattern!r}: '*' stands for anything")
        return cls(tuple(sources), time, tuple(map(float, sigma_rels)), tuple(overrides))

    def empty(self) -> dict[str, np.ndarray]:
        """Room for one average: float32 where the sources are floating point, else in their dtype."""
        entries = self.sources[0].reader.entries.items()
        return {name: np.empty(e.shape, np.float32 if e.floating else DTYPES[e.dtype]) for name, e in entries}

    @property
    def usable(self) -> tuple[Source, ...]:
        """The sources up to ``time``; the last is the latest."""
        return tuple(source for source in self.sources if source.time <= self.time)

    @property
    def config(self) -> NetworkConfig | None:
        return self.sources[0].config

    @property
    def lengths(self) -> tuple[float, ...]:
        """All lengths in use, each once."""
        return tuple(dict.fromkeys((*self.sigma_rels, *(length for _, length in self.overrides))))

    @cached_property
    def error(self) -> ReconstructionError:
        """What each of ``lengths`` is predicted to be off by; 0 where it is stored."""
        found = reconstruction_error(**self.solved(np.array(self.lengths)))
        stored = np.array([self._stored(length) is not None for length in self.lengths])
        return ReconstructionError(
            *(np.where(stored, 0, x) for x in (found.profile, found.amplification, found.rounding))
        )

    def solved(self, lengths: np.ndarray, /) -> dict[str, Any]:
        """What :func:`edm2_core.ema.coefficients` and :func:`~edm2_core.ema.reconstruction_error` take for these."""
        return {
            "in_time": np.array([source.time for source in self.sources], np.float64),
            "in_sigma_rel": np.array([source.sigma_rel for source in self.sources]),
            "in_half_life": np.array([source.half_life for source in self.sources]),
            "out_time": float(self.time),
            "out_sigma_rel": lengths,
        }

    @cached_property
    def _columns(self) -> Mapping[float, np.ndarray]:
        """float32 [n_in] for each of ``lengths``. What is stored is taken as it is, for its fit is only nearly it."""
        fit = coefficients(**self.solved(np.array(self.lengths))).astype(np.float32)
        columns = dict(zip(self.lengths, fit.T, strict=True))
        for length in self.lengths:
            if (index := self._stored(length)) is not None:
                columns[length] = np.eye(len(self.sources), dtype=np.float32)[index]
        return columns

    def _stored(self, sigma_rel: float) -> int | None:
        same = (
            i
            for i, source in enumerate(self.sources)
            if source.time == self.time and isclose(source.sigma_rel, sigma_rel, rel_tol=_SAME)
        )
        return next(same, None)

    def weights(self, name: str, /) -> np.ndarray:
        """float32 [n_out, n_in] for the array called ``name``."""
        matching = [length for pattern, length in self.overrides if fnmatchcase(name, pattern)]
        lengths = matching[-1:] * len(self.sigma_rels) or self.sigma_rels
        return np.stack([self._columns[length] for length in lengths])

    def blocks(self, size: int, /) -> Iterator[Block]:
        """All arrays in parts of ``size`` elements; those that are not averaged in one."""
        for name, entry in self.sources[0].reader.entries.items():
            step = size if entry.floating else max(entry.size, 1)
            for start in range(0, entry.size, step):
                yield Block(name, start, min(start + step, entry.size))

    @property
    def size(self) -> int:
        """Elements of one average."""
        return sum(entry.size for entry in self.sources[0].reader.entries.values())

    def compute(self, block: Block, room: "Room", /) -> np.ndarray:
        """[n_out, elements], valid until ``room`` is used again: float32, or, where it is not floating point, what the
        latest source has.

        Raises:
            Broken: a source ends early, or has values that are not finite.
        """
        size, outputs = block.stop - block.start, len(self.sigma_rels)
        if not self.sources[0].reader.entries[block.name].floating:
            (latest,) = self._read([self.usable[-1]], block, room)
            return np.broadcast_to(latest, (outputs, size))
        weights = self.weights(block.name)
        result = room.array("made", np.float32, outputs, size)
        groups = [
            (dtype, weights[:, used], self._read([self.sources[i] for i in used], block, room))
            for dtype, used in self._used(block.name, weights).items()
        ]
        wide = room.array("wide", np.float32, len(self.sources), min(size, _PIECE)).reshape(-1)
        with np.errstate(all="ignore"):
            for start in range(0, size, _PIECE):
                piece = slice(start, min(start + _PIECE, size))
                for index, (dtype, factors, stored) in enumerate(groups):
                    values = wide[: len(stored) * (piece.stop - start)].reshape(len(stored), -1)
                    widen(stored[:, piece], dtype, values)
                    if index:
                        result[:, piece] += factors @ values
                    else:
                        np.matmul(factors, values, out=result[:, piece])
                if not (np.isfinite(result[:, piece].min()) and np.isfinite(result[:, piece].max())):  # nan is both
                    self._find_nonfinite(block)
        return result

    def _used(self, name: str, weights: np.ndarray) -> dict[str, list[int]]:
        """Which sources take part, by the dtype that they are stored in."""
        found: dict[str, list[int]] = {}
        for index in np.flatnonzero(weights.any(axis=0)):
            found.setdefault(self.sources[index].reader.entries[name].dtype, []).append(int(index))
        return found

    def _read(self, sources: Sequence[Source], block: Block, room: "Room") -> np.ndarray:
        """[sources, elements], as they are stored; they have one dtype."""
        code = sources[0].reader.entries[block.name].dtype
        stored = room.array(code, DTYPES[code], len(sources), block.stop - block.start)
        for source, row in zip(sources, stored, strict=True):
            try:
                source.reader.fill(row, block.name, block.start)
            except InputError as error:
                raise Broken(source.path, str(error)) from error
        return stored

    def _find_nonfinite(self, block: Block) -> None:
        for source in self.usable:
            stored = self._read([source], block, Room())
            widen(stored, source.reader.entries[block.name].dtype, values := np.empty(stored.shape, np.float32))
            if not np.isfinite(values).all():
                raise Broken(source.path, f"{source.path}: {block.name} must be finite, got other values: leave it out")
        raise InputError(f"sums of {block.name} must be finite, got more than float32 holds: choose another length")


def widen(stored: np.ndarray, dtype: str, values: np.ndarray, /) -> None:
    """Copy ``stored``, what a file calls ``dtype``, into the contiguous float32 ``values`` of the same shape."""
    if dtype == "F16":
        numkong.astype(stored, "float32", out=values)  # NumPy converts float16 one by one, 16 times as slowly
    elif dtype == "BF16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
    else:
        values[:] = stored


class Room(threading.local):
    """Each thread's working arrays, kept from block to block: fresh memory costs more time than the sums."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def array(self, name: str, dtype: Any, rows: int, columns: int, /) -> np.ndarray:
        """[rows, columns], contiguous; the same memory for the same name."""
        kept = self._kept.get(name)
        if kept is None or kept.size < rows * columns:
            kept = self._kept[name] = np.empty(rows * columns, dtype)
        return kept[: rows * columns].reshape(rows, columns)


def run(
    recipe: Recipe,
    consume: Callable[[Block, np.ndarray], None],
    /,
    *,
    memory: int = GiB,
    skip: int = 0,
) -> Iterator[tuple[int, int]]:
    """Compute all blocks but the first ``skip``, in order; after each yield (blocks done, its elements).

    ``consume`` is called from several threads, once for each block.

    Raises:
        InputError: too little ``memory``; see :meth:`Recipe.compute` and ``consume``.
    """
    size = block_size(recipe, memory=memory)

    room = Room()

    def work(block: Block) -> int:
        consume(block, recipe.compute(block, room))
        return block.stop - block.start

    waiting: deque[Future[int]] = deque()
    done = skip
    with threadpool_limits(1), ThreadPoolExecutor(THREADS) as pool:
        try:
            for index, block in enumerate(recipe.blocks(size)):
                if index < skip:
                    continue
                waiting.append(pool.submit(work, block))
                if len(waiting) >= _AHEAD * THREADS:
                    done += 1
                    yield done, waiting.popleft().result()
            while waiting:
                done += 1
                yield done, waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def block_size(recipe: Recipe, *, memory: int) -> int:
    """Elements of a block so that all blocks in work fit into ``memory`` bytes: a power of 2.

    Raises:
        InputError: not even the smallest fits.
    """
    an_element = 8 * len(recipe.usable) + 12 * len(recipe.sigma_rels)  # read, widened; summed, copied, rounded
    least, most = _BLOCKS
    fitting = memory // (an_element * THREADS)
    if fitting < least:
        raise InputError(
            f"memory for {len(recipe.usable)} files and {len(recipe.sigma_rels)} averages must be at least "
            f"{least * an_element * THREADS} bytes, got {memory}: give more, or want fewer at a time"
        )
    return min(most, 1 << (fitting.bit_length() - 1))
