"""Averages as combinations of stored ones: their weights, their predicted errors, and their values block by block."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import isclose
from typing import Any

import numkong
import numpy as np

from edm2_core.ema import Length, ReconstructionError, coefficients, reconstruction_error
from edm2_core.ema.reconstruction import STORAGE
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .safetensors_io import DTYPES, Entry
from .sources import Broken, Source

_SAME = 1e-6  # relative difference below which two lengths are equal
_PIECE = 1 << 12  # elements that are converted and summed at a time, so that they stay in the cache

Override = tuple[str, float]


@dataclass(frozen=True)
class Block:
    """Elements ``start`` to ``stop`` of one flattened array."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Combination:
    """How the averages of the lengths ``sigma_rels`` at ``time`` are computed from ``sources``, in order of time.

    ``overrides`` are pairs (pattern, sigma_rel) for arrays of other lengths; the last pattern that matches an array
    counts. ``weights`` are those of the sources by length, float32 [n_in], and 0 for sources after ``time``, which are
    not read. Made by :meth:`of`.
    """

    sources: tuple[Source, ...]
    time: int
    sigma_rels: tuple[float, ...]
    overrides: tuple[Override, ...]
    weights: Mapping[float, np.ndarray]

    @classmethod
    def of(
        cls,
        sources: Sequence[Source],
        /,
        *,
        time: int | None = None,
        sigma_rels: Sequence[float],
        overrides: Sequence[Override] = (),
    ) -> "Combination":
        """The combination for these lengths; ``time`` None is that of the last source.

        Raises:
            InputError: no sources, a time outside theirs, a length outside (0, 0.2887], a pattern without match.
        """
        if not sources:
            raise InputError("snapshots to reconstruct from must be one or more, got none: give their paths")
        for sigma_rel in (*sigma_rels, *(sigma_rel for _, sigma_rel in overrides)):
            Length.of(sigma_rel)
        first, last = min(source.time for source in sources), max(source.time for source in sources)
        if time is not None and not first <= time <= last:
            raise InputError(
                f"the time of an average must be from {first} to {last} images, got {time}: choose one in between"
            )
        for pattern, _ in overrides:
            if not any(fnmatchcase(name, pattern) for name in sources[0].reader.entries):
                raise InputError(f"an override must match an array, got {pattern!r}: '*' stands for anything")
        new = cls(tuple(sources), last if time is None else time, tuple(map(float, sigma_rels)), tuple(overrides), {})
        return replace(new, weights=new._solve())

    def only(self, sigma_rels: Sequence[float], /) -> "Combination":
        """The same for some of its lengths."""
        return replace(self, sigma_rels=tuple(sigma_rels))

    @property
    def lengths(self) -> tuple[float, ...]:
        """All sigma_rels in use, those of overrides included, each once."""
        return tuple(dict.fromkeys((*self.sigma_rels, *(sigma_rel for _, sigma_rel in self.overrides))))

    @property
    def usable(self) -> tuple[Source, ...]:
        """The sources up to ``time``; the last is the latest."""
        return tuple(source for source in self.sources if source.time <= self.time)

    @property
    def config(self) -> NetworkConfig | None:
        return self.sources[0].config

    @property
    def latest(self) -> Source:
        """The latest source in use: arrays that are not averaged are taken from it."""
        return self.usable[-1]

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The arrays of the latest source in use; those of the others have the same shapes."""
        return self.latest.reader.entries

    def averaged(self, name: str, /) -> bool:
        """Whether the array called ``name`` is averaged; otherwise it is taken from the latest source as it is."""
        return self.entries[name].floating and name not in self.latest.metadata.kept

    @property
    def stored_dtype(self) -> str:
        """The coarsest dtype in which the sources store averages, by its name in :mod:`edm2_core.ema`."""
        names = {"F16": "float16", "BF16": "bfloat16"}
        stored = {e.dtype for s in self.usable for n, e in s.reader.entries.items() if e.shape and self.averaged(n)}
        return max((names.get(dtype, "float32") for dtype in stored), key=STORAGE.__getitem__, default="float32")

    def arguments(self, sigma_rels: Sequence[float] | np.ndarray, /) -> dict[str, Any]:
        """The arguments of :func:`edm2_core.ema.coefficients` and of :func:`~edm2_core.ema.reconstruction_error` for
        these lengths."""
        return {
            "in_time": np.array([source.time for source in self.sources], np.float64),
            "in_sigma_rel": [source.length for source in self.sources],
            "out_time": float(self.time),
            "out_sigma_rel": np.asarray(sigma_rels),
        }

    @cached_property
    def error(self) -> ReconstructionError:
        """The predicted error of each of ``lengths``; 0 for a length that is stored at ``time``."""
        fitted = reconstruction_error(**self.arguments(self.lengths), dtype=self.stored_dtype)
        stored = np.array([self._stored(length) is not None for length in self.lengths])
        fields = (fitted.profile, fitted.amplification, fitted.rounding)
        return ReconstructionError(*(np.where(stored, 0, field) for field in fields))

    def _solve(self) -> dict[float, np.ndarray]:
        if not self.lengths:
            return {}
        fit = coefficients(**self.arguments(self.lengths)).astype(np.float32)
        weights = dict(zip(self.lengths, fit.T, strict=True))
        for length in self.lengths:
            if (index := self._stored(length)) is not None:  # exact, where the fit is only nearly so
                weights[length] = np.eye(len(self.sources), dtype=np.float32)[index]
        return weights

    def _stored(self, sigma_rel: float) -> int | None:
        """The index of the source that is this average."""
        for index, source in enumerate(self.sources):
            length = source.length
            if source.time == self.time and length.relative and isclose(length.value, sigma_rel, rel_tol=_SAME):
                return index
        return None

    def weights_of(self, name: str, /) -> np.ndarray:
        """float32 [n_out, n_in] for the array called ``name``."""
        matching = [sigma_rel for pattern, sigma_rel in self.overrides if fnmatchcase(name, pattern)]
        sigma_rels = matching[-1:] * len(self.sigma_rels) or self.sigma_rels
        return np.stack([self.weights[sigma_rel] for sigma_rel in sigma_rels])

    def blocks(self, size: int, /) -> Iterator[Block]:
        """All arrays in blocks of ``size`` elements; arrays that are not averaged in one block each."""
        for name, entry in self.entries.items():
            step = size if self.averaged(name) else max(entry.size, 1)
            for start in range(0, entry.size, step):
                yield Block(name, start, min(start + step, entry.size))

    def compute(self, block: Block, workspace: "Workspace", /) -> np.ndarray:
        """[n_out, elements]: float32, or the latest source's values where the array is not averaged.

        Valid until ``workspace`` is used again.

        Raises:
            Broken: a source ends early, or has values that are not finite.
            InputError: a sum is beyond float32.
        """
        size, outputs = block.stop - block.start, len(self.sigma_rels)
        if not self.averaged(block.name):
            (latest,) = _read([self.latest], block, workspace)
            return np.broadcast_to(latest, (outputs, size))
        weights = self.weights_of(block.name)
        result = workspace.array("result", np.float32, outputs, size)
        groups = [
            (dtype, weights[:, used], _read([self.sources[i] for i in used], block, workspace))
            for dtype, used in self._used_by_dtype(block.name, weights).items()
        ]
        float32 = workspace.array("float32", np.float32, len(self.sources), min(size, _PIECE)).reshape(-1)
        with np.errstate(all="ignore"):
            for start in range(0, size, _PIECE):
                piece = slice(start, min(start + _PIECE, size))
                for index, (dtype, factors, stored) in enumerate(groups):
                    values = float32[: len(stored) * (piece.stop - start)].reshape(len(stored), -1)
                    to_float32(stored[:, piece], dtype, values)
                    if index:
                        result[:, piece] += factors @ values
                    else:
                        np.matmul(factors, values, out=result[:, piece])
                if not (np.isfinite(result[:, piece].min()) and np.isfinite(result[:, piece].max())):  # nan is both
                    self._raise_nonfinite(block)
        return result

    def _used_by_dtype(self, name: str, weights: np.ndarray) -> dict[str, list[int]]:
        """The sources that have a weight, by the dtype of the array in them."""
        used: dict[str, list[int]] = {}
        for index in np.flatnonzero(weights.any(axis=0)):
            used.setdefault(self.sources[index].reader.entries[name].dtype, []).append(int(index))
        return used

    def _raise_nonfinite(self, block: Block) -> None:
        for source in self.usable:
            stored = _read([source], block, Workspace())
            to_float32(stored, source.reader.entries[block.name].dtype, values := np.empty(stored.shape, np.float32))
            if not np.isfinite(values).all():
                raise Broken(source.path, f"{source.path}: {block.name} must be finite, got other values: leave it out")
        raise InputError(f"sums of {block.name} must be finite, got more than float32 holds: choose another length")


class Workspace(threading.local):
    """Working arrays of each thread, reused from block to block: allocating them takes longer than the sums."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, dtype: Any, rows: int, columns: int, /) -> np.ndarray:
        """[rows, columns], contiguous; the same memory for the same name."""
        array = self._arrays.get(name)
        if array is None or array.size < rows * columns:
            array = self._arrays[name] = np.empty(rows * columns, dtype)
        return array[: rows * columns].reshape(rows, columns)


def _read(sources: Sequence[Source], block: Block, workspace: Workspace) -> np.ndarray:
    """[sources, elements] in their stored dtype, which must be the same."""
    code = sources[0].reader.entries[block.name].dtype
    stored = workspace.array(code, DTYPES[code], len(sources), block.stop - block.start)
    for source, row in zip(sources, stored, strict=True):
        try:
            source.reader.fill(row, block.name, block.start)
        except InputError as error:
            raise Broken(source.path, str(error)) from error
    return stored


def to_float32(stored: np.ndarray, dtype: str, values: np.ndarray, /) -> None:
    """Convert ``stored``, of the file dtype ``dtype``, into the contiguous float32 ``values`` of the same shape."""
    if dtype == "F16":
        numkong.astype(stored, "float32", out=values)  # 16 times as fast as NumPy, which converts one by one
    elif dtype == "BF16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
    else:
        values[:] = stored
