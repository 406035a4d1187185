"""Comparisons of a port's answers with an oracle.

Every comparison of a case goes through :func:`within` or :func:`close`. They record the worst ratio of error to
tolerance for the report, and raise :class:`Disagreement` with a complete description where the ratio exceeds 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance import tolerance


@dataclass
class Record:
    """The result of one case: comparisons made, examples drawn, the worst error over tolerance and where it was."""

    examples: int = 0
    comparisons: int = 0
    worst: float = 0.0
    at: str = ""
    failure: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Record") -> None:
        self.comparisons += other.comparisons
        if not other.worst <= self.worst:
            self.worst, self.at = other.worst, other.at


_records: list[Record] = []  # comparisons are added to the last
_wider: list[float] = [1.0]  # the last multiplies tolerances


@contextmanager
def recording(record: Record) -> Iterator[Record]:
    """Comparisons made inside are added to ``record``."""
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def record(made: Record) -> None:
    """Add comparisons to the current record, if there is one."""
    if _records:
        _records[-1].add(made)


@contextmanager
def widened(factor: float) -> Iterator[None]:
    """Tolerances are ``factor`` times as wide inside."""
    _wider.append(factor * _wider[-1])
    try:
        yield
    finally:
        _wider.pop()


class Disagreement(AssertionError):
    """A result outside its tolerance: ``ratio`` is error over tolerance, inf where there is no tolerance. ``words`` is
    the description by heading."""

    def __init__(self, summary: str, words: Mapping[str, str], ratio: float = np.inf):
        self.summary, self.words, self.ratio = summary, dict(words), ratio
        super().__init__(summary)

    def __str__(self) -> str:
        width = max(map(len, self.words), default=0)
        return "\n".join([self.summary, *(f"  {heading:{width}}  {text}" for heading, text in self.words.items())])


def within(off: float, allowed: float, *, what: str, why: str, got: Any = None, wanted: Any = None) -> None:
    """Record the ratio of ``off`` to ``allowed``; raises Disagreement unless it is at most 1."""
    allowed *= _wider[-1]
    ratio = float(off) / allowed if allowed else (np.inf if off else 0.0)
    record(Record(comparisons=1, worst=ratio, at=what))
    if not ratio <= 1:
        words = {"got": _shown(got), "wanted": _shown(wanted), "tolerance": f"{allowed:.3g}: {why}"}
        raise Disagreement(f"{what}: off by {off:.3g}, {ratio:.3g} times the tolerance", words, ratio)


def close(got: Any, wanted: Any, allowed: float, *, what: str, why: str, floor: float = 0.0) -> None:
    """:func:`within` for arrays of float32: the Frobenius norm of the difference relative to that of ``wanted``."""
    like_float32(got, np.shape(wanted), what=what)
    at = _worst_element(got, wanted)
    off = tolerance.relative(got, wanted, floor)
    within(off, allowed, what=what, why=f"relative Frobenius norm, {why}", got=(got, at), wanted=(wanted, at))


def close_all(
    got: Mapping[str, Any], wanted: Mapping[str, Any], allowed: float, *, what: str, why: str, floor: float = 0.0
) -> None:
    """:func:`close` for each of two dicts' arrays; the names must be the same."""
    same_names(got, wanted, what=what)
    for name in wanted:
        close(got[name], wanted[name], allowed, what=f"{what} of {name}", why=why, floor=floor)


def holds(condition: bool, what: str, *, got: Any = "", wanted: Any = "") -> None:
    """A statement without a tolerance."""
    record(Record(comparisons=1))
    if not condition:
        raise Disagreement(what, {"got": str(got), "wanted": str(wanted), "tolerance": "0: holds exactly"})


def same_names(got: Mapping[Any, Any], wanted: Any, *, what: str) -> None:
    missing, unknown = set(wanted) - set(got), set(got) - set(wanted)
    holds(not missing and not unknown, f"{what} must have the plan's names", got=f"{_few(unknown)} too many, "
          f"{_few(missing)} missing", wanted=f"{len(set(wanted))} names")  # fmt: skip


def like_float32(array: Any, shape: tuple[int, ...], *, what: str) -> None:
    got = f"{type(array).__name__} {getattr(array, 'dtype', '')} {getattr(array, 'shape', '')}"
    fits = isinstance(array, np.ndarray) and (array.dtype, array.shape) == (np.float32, shape)
    holds(fits, f"{what} must be a float32 NumPy array of shape {shape}", got=got, wanted=f"ndarray float32 {shape}")


def _few(names: set[Any]) -> str:
    return ", ".join(map(str, sorted(names, key=str)[:3])) or "none"


def _worst_element(got: Any, wanted: Any) -> tuple[int, ...]:
    off = np.abs(np.asarray(got, np.float64) - np.asarray(wanted, np.float64))
    return tuple(map(int, np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape))) if off.ndim else ()


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], tuple):
        array, at = np.asarray(value[0]), value[1]
        return f"{float(array[at]):.9g} at {list(at)} of {list(array.shape)}, where the difference is largest"
    return f"{value:.9g}" if isinstance(value, float | np.floating) else str(value)
