"""Plans of which averages to store when, as data: what is due at a step, what may be deleted, and the error to expect.

A snapshot plan for a run of known duration is a :class:`TimedPlan`. A run without known end has an :class:`OpenPlan`:
times in geometric progression, of which the latest are kept. :func:`~edm2_core.ema.plan_snapshots` finds both; they are
stored as JSON.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import floor, isfinite, log

import numpy as np

from ..errors import InputError
from ..json_text import parse_json
from .profiles import sigma_rel_to_gamma
from .reconstruction import STORAGE, ReconstructionError, StorageDtype, reconstruction_error

FORMAT, VERSION = "edm2-plan", 1
KIMG = 1000  # files are named by thousands of images
TARGETS = 24  # lengths within the range for which the search computes errors
_PHASES = (0.0, 0.02, 0.25, 0.5, 0.75)  # ends between two storage times at which the error of an open plan is computed;
# just after one of them is worst, since two averages that are nearly the same amplify the rounding of storage
Errors = ReconstructionError[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class TimedPlan:
    """The snapshot plan of a run of ``duration`` images.

    ``times[i]`` are the times at which the average of length ``sigma_rels[i]`` is stored: whole numbers of images, in
    order. An average is stored at the first step that reaches one of them. ``range`` is the range of lengths that the
    plan was made for, ``dtype`` the dtype of stored files.
    """

    duration: int
    sigma_rels: tuple[float, ...]
    times: tuple[tuple[int, ...], ...]
    range: tuple[float, float]
    dtype: StorageDtype = "float16"

    def due(self, before: int, now: int, *, end: bool = False) -> tuple[float, ...]:
        """The lengths to store after a step from ``before`` to ``now`` images; ``end``: it is the last of the run."""
        pairs = zip(self.sigma_rels, self.times, strict=True)
        return tuple(length for length, times in pairs if any(before < time <= now for time in times))

    def stale(self, stored: Iterable[tuple[int, float]], /) -> list[tuple[int, float]]:
        """Those of the stored (time, length) that may be deleted: none."""
        return []

    def stored_at(self, duration: float, /) -> tuple[np.ndarray, np.ndarray]:
        """Times and lengths, 1-D, of the files that exist after ``duration`` images."""
        pairs = [(t, s) for s, times in zip(self.sigma_rels, self.times, strict=True) for t in times if t <= duration]
        return np.array([float(t) for t, _ in pairs]), np.array([s for _, s in pairs])

    @property
    def files(self) -> int:
        """How many files the run stores."""
        return sum(map(len, self.times))

    def error(self, sigma_rels: np.ndarray, /) -> Errors:
        """The predicted errors of averages of these lengths [n] at the end of the run."""
        times, lengths = self.stored_at(self.duration)
        return _error(times, lengths, float(self.duration), sigma_rels, self.dtype)

    def to_json(self) -> str:
        """The plan as JSON text, which :func:`plan_from_json` reads."""
        return _to_json(self)


@dataclass(frozen=True, kw_only=True)
class OpenPlan:
    """The snapshot plan of a run that may end at any time.

    The averages ``sigma_rels`` are stored each time that the number of images has grown by the factor ``ratio``, and at
    the end. Of each length, the latest file and ``kept`` files before it stay. Other fields are those of
    :class:`TimedPlan`.
    """

    sigma_rels: tuple[float, ...]
    ratio: float
    kept: int
    range: tuple[float, float]
    dtype: StorageDtype = "float16"

    def due(self, before: int, now: int, *, end: bool = False) -> tuple[float, ...]:
        """As :meth:`TimedPlan.due`."""
        return self.sigma_rels if end or self._count(now) > self._count(before) else ()

    def _count(self, time: int) -> int:
        return floor(log(time / KIMG) / log(self.ratio) + 1e-9) if time >= KIMG else -1

    def stale(self, stored: Iterable[tuple[int, float]], /) -> list[tuple[int, float]]:
        """As :meth:`TimedPlan.stale`: of each length, all but the latest and ``kept`` before it."""
        files = list(stored)
        by_length = (sorted((t, s) for t, s in files if s == length) for length in {s for _, s in files})
        return [pair for pairs in by_length for pair in pairs[: -self.kept - 1]]

    def stored_at(self, duration: float, /) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`TimedPlan.stored_at`, for a run that ended after ``duration`` images."""
        last = KIMG * self.ratio ** self._count(int(duration))
        times = np.array(
            [duration, *(last * self.ratio**-k for k in range(self.kept) if last * self.ratio**-k >= KIMG)]
        )
        times = np.unique(times[times > 0])
        return np.repeat(times, len(self.sigma_rels)), np.tile(self.sigma_rels, len(times))

    @property
    def files(self) -> int:
        """The largest number of files that exist at once."""
        return len(self.sigma_rels) * (self.kept + 1)

    def error(self, sigma_rels: np.ndarray, /) -> Errors:
        """The predicted errors of averages of these lengths [n], each the worst over possible ends of a long run."""
        errors = [self._error_of_phase(sigma_rels, phase) for phase in _PHASES]
        worst = np.argmax([error.total for error in errors], axis=0)  # [n]
        fields = (np.stack([getattr(e, f) for e in errors]) for f in ("profile", "amplification", "rounding"))
        return ReconstructionError(*(np.take_along_axis(field, worst[None], axis=0)[0] for field in fields))

    def _error_of_phase(self, sigma_rels: np.ndarray, phase: float) -> Errors:
        """The errors if the run ends at ratio^phase times the last storage time, in units of which times are here."""
        times = np.array([self.ratio**phase, *(self.ratio**-k for k in range(self.kept))])
        times = np.unique(times)
        lengths = np.tile(self.sigma_rels, len(times))
        return _error(np.repeat(times, len(self.sigma_rels)), lengths, times[-1], sigma_rels, self.dtype)

    def to_json(self) -> str:
        """The plan as JSON text, which :func:`plan_from_json` reads."""
        return _to_json(self)


SnapshotPlan = TimedPlan | OpenPlan


def uniform_plan(*, files: int, duration: int, sigma_rels: Sequence[float] = (0.05, 0.10)) -> TimedPlan:
    """The usual snapshots, for comparison: all lengths, at equal intervals."""
    count = max(files // len(sigma_rels), 1)
    times = tuple(round(duration * (i + 1) / count) for i in range(count))
    return TimedPlan(
        duration=duration, sigma_rels=tuple(sigma_rels), times=(times,) * len(sigma_rels), range=(0.01, 0.25)
    )


def worst_error(snapshot_plan: SnapshotPlan, /) -> float:
    """The largest total error over the plan's range of lengths."""
    return float(snapshot_plan.error(np.geomspace(*snapshot_plan.range, 2 * TARGETS + 1)).total.max())


def plan_from_json(text: str, *, name: str) -> SnapshotPlan:
    """The snapshot plan in JSON text that ``to_json`` wrote; ``name`` is that of its file, for error messages.

    Raises:
        InputError: ``text`` is not JSON, or not a plan, or of a newer version, or its times or lengths are invalid.
    """
    try:
        values = dict(parse_json(text))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        if _whole(version := values.pop("version")) != VERSION:
            raise InputError(f"{name} must be a plan of version {VERSION}, got {version!r}: install a newer edm2")
        values["sigma_rels"] = tuple(map(float, values["sigma_rels"]))
        low, high = map(float, values["range"])
        values["range"] = (low, high)
        if "times" in values:
            values["times"] = tuple(tuple(map(_whole, times)) for times in values["times"])
            snapshot_plan: SnapshotPlan = TimedPlan(**values | {"duration": _whole(values["duration"])})
        else:
            snapshot_plan = OpenPlan(**values | {"kept": _whole(values["kept"])})
        _check(snapshot_plan)
        return snapshot_plan
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and str(error).startswith(name):
            raise
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name} must be a plan as edm2 plan writes it, got a fault: {why}: make it again") from error


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r}, which is no whole number")
    return value


def _to_json(snapshot_plan: SnapshotPlan) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(snapshot_plan)}, indent=1) + "\n"


def _check(snapshot_plan: SnapshotPlan) -> None:
    """Raise ValueError, or InputError, with what is wrong about the fields of a plan that came from JSON."""
    for length in (*snapshot_plan.sigma_rels, *snapshot_plan.range):
        sigma_rel_to_gamma(length)
    if (
        len({f"{length:.3f}" for length in snapshot_plan.sigma_rels}) < len(snapshot_plan.sigma_rels)
        or not snapshot_plan.sigma_rels
    ):
        raise ValueError("lengths that do not differ in their first three digits")
    if snapshot_plan.range[0] > snapshot_plan.range[1]:
        raise ValueError(f"a range from {snapshot_plan.range[0]} to {snapshot_plan.range[1]}")
    if snapshot_plan.dtype not in STORAGE:
        raise ValueError(f"dtype {snapshot_plan.dtype!r}")
    if isinstance(snapshot_plan, OpenPlan):
        if not (isfinite(snapshot_plan.ratio) and snapshot_plan.ratio > 1) or snapshot_plan.kept < 1:
            raise ValueError(f"ratio {snapshot_plan.ratio}, kept {snapshot_plan.kept}")
        return
    if len(snapshot_plan.times) != len(snapshot_plan.sigma_rels):
        raise ValueError("another number of lists of times than of lengths")
    for times in snapshot_plan.times:
        if list(times) != sorted(set(times)) or (times and not 0 < times[0] <= times[-1] <= snapshot_plan.duration):
            raise ValueError("times that are not in order within the duration")
        if len({time // KIMG for time in times}) < len(times):
            raise ValueError("two times within the same thousand images, which have one file name")
    if not any(snapshot_plan.duration in times for times in snapshot_plan.times):
        raise ValueError("no file at the end of the run")


def _error(times: np.ndarray, lengths: np.ndarray, end: float, wanted: np.ndarray, dtype: StorageDtype) -> Errors:
    return reconstruction_error(in_time=times, in_sigma_rel=lengths, out_time=end, out_sigma_rel=wanted, dtype=dtype)
