"""Which averages to store when, so that any length within a range can be reconstructed well from few files.

Uniform snapshots waste: a short average needs files near the end of training, a long one hardly needs more than itself.
A plan for a run of known duration is found greedily: of all (time, length) that could be stored, take the one that most
lowers the wanted profiles' residuals, subtract from all others what it explains, and go on; the lengths worth tracking,
few because each is a copy of the network in memory, are found by trying neighbours of a first guess. What counts in the
end is the real error of reconstruction, storage rounding included.

A run without known end gets a plan that looks the same from everywhere: times in geometric progression, of which the
latest are kept.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, floor, isfinite, log

import numpy as np

from ..errors import InputError
from .profiles import Profile, sigma_rel_to_gamma
from .reconstruction import STORAGE, ReconstructionError, reconstruction_error

FORMAT, VERSION = "edm2-plan", 1
KIMG = 1000  # files are named by thousands of images
_TARGETS, _CANDIDATES = 24, 96  # lengths in the range that are looked at, and times that may be chosen
_SHARP = 4  # residuals count with this power: the worst count most, but not alone
_STEPS = (1.5, 1.2, 1.08)  # by which tracked lengths are varied, coarse to fine
_PHASES = (0.0, 0.02, 0.25, 0.5, 0.75)  # ends between two storage times that an open plan is tried at; just after one
# of them is worst, since two averages that are nearly the same amplify what storage rounds


@dataclass(frozen=True, kw_only=True)
class TimedPlan:
    """For a run of ``duration`` images: ``times[i]`` are those at which the average ``sigma_rels[i]`` is stored.

    ``range`` is that of lengths it was made for, ``dtype`` how files are stored. Times are whole numbers of images, in
    order; an average is stored at the first step that reaches one.
    """

    duration: int
    sigma_rels: tuple[float, ...]
    times: tuple[tuple[int, ...], ...]
    range: tuple[float, float]
    dtype: str = "float16"

    def due(self, before: int, now: int, *, end: bool = False) -> tuple[float, ...]:
        """The lengths to be stored when the clock has gone from ``before`` to ``now``, which may be the run's end."""
        pairs = zip(self.sigma_rels, self.times, strict=True)
        return tuple(length for length, times in pairs if any(before < time <= now for time in times))

    def stale(self, stored: Iterable[tuple[int, float]], /) -> list[tuple[int, float]]:
        """Which of the (time, length) stored may go: none."""
        return []

    def stored_at(self, duration: float, /) -> tuple[np.ndarray, np.ndarray]:
        """Times and lengths, 1-D, of what is there after so many images."""
        pairs = [(t, s) for s, times in zip(self.sigma_rels, self.times, strict=True) for t in times if t <= duration]
        return np.array([float(t) for t, _ in pairs]), np.array([s for _, s in pairs])

    @property
    def files(self) -> int:
        return sum(map(len, self.times))

    def error(self, sigma_rels: np.ndarray, /) -> ReconstructionError:
        """What averages of these lengths, at the end of the run, are predicted to be off by."""
        times, lengths = self.stored_at(self.duration)
        return _error(times, lengths, float(self.duration), sigma_rels, self.dtype)

    def to_json(self) -> str:
        return _to_json(self)


@dataclass(frozen=True, kw_only=True)
class OpenPlan:
    """For a run that may end any time: the averages ``sigma_rels`` are stored whenever the time has grown by ``ratio``.

    Of each, the latest stays and ``kept`` before it; all are stored at the end, too. Other fields as in
    :class:`TimedPlan`.
    """

    sigma_rels: tuple[float, ...]
    ratio: float
    kept: int
    range: tuple[float, float]
    dtype: str = "float16"

    def due(self, before: int, now: int, *, end: bool = False) -> tuple[float, ...]:
        """As :meth:`TimedPlan.due`."""
        return self.sigma_rels if end or self._count(now) > self._count(before) else ()

    def _count(self, time: int) -> int:
        return floor(log(time / KIMG) / log(self.ratio) + 1e-9) if time >= KIMG else -1

    def stale(self, stored: Iterable[tuple[int, float]], /) -> list[tuple[int, float]]:
        """Which of the (time, length) stored may go: of each length, all but the latest and ``kept`` before it."""
        found = list(stored)
        by_length = (sorted((t, s) for t, s in found if s == length) for length in {s for _, s in found})
        return [pair for pairs in by_length for pair in pairs[: -self.kept - 1]]

    def stored_at(self, duration: float, /) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`TimedPlan.stored_at`; ``duration`` is where the run ended."""
        last = KIMG * self.ratio ** self._count(int(duration))
        times = np.array(
            [duration, *(last * self.ratio**-k for k in range(self.kept) if last * self.ratio**-k >= KIMG)]
        )
        times = np.unique(times[times > 0])
        return np.repeat(times, len(self.sigma_rels)), np.tile(self.sigma_rels, len(times))

    @property
    def files(self) -> int:
        """The most that are there at once."""
        return len(self.sigma_rels) * (self.kept + 1)

    def error(self, sigma_rels: np.ndarray, /) -> ReconstructionError:
        """The worst, over ends of a long run, that averages of these lengths are predicted to be off by."""
        found = [self._error_of_phase(sigma_rels, phase) for phase in _PHASES]
        worst = np.argmax([error.total for error in found], axis=0)
        columns = range(len(sigma_rels))
        return ReconstructionError(
            *(
                np.array([getattr(found[w], field)[j] for w, j in zip(worst, columns, strict=True)])
                for field in ("profile", "amplification", "rounding")
            )
        )

    def _error_of_phase(self, sigma_rels: np.ndarray, phase: float) -> ReconstructionError:
        """With the end at ratio^phase times the last storage, in units of that."""
        times = np.array([self.ratio**phase, *(self.ratio**-k for k in range(self.kept))])
        times = np.unique(times)
        lengths = np.tile(self.sigma_rels, len(times))
        return _error(np.repeat(times, len(self.sigma_rels)), lengths, times[-1], sigma_rels, self.dtype)

    def to_json(self) -> str:
        return _to_json(self)


SnapshotPlan = TimedPlan | OpenPlan


def plan_snapshots(
    *,
    files: int,
    sigma_rel_range: tuple[float, float],
    duration: int | None = None,
    max_lengths: int = 3,
    batch: int = 1,
    dtype: str = "float16",
) -> SnapshotPlan:
    """The plan with at most ``files`` files whose worst error over lengths in the range is least.

    Args:
        files: how many may be there at once.
        sigma_rel_range: the shortest and the longest average that is to be reconstructed.
        duration: of the run, in images; None: its end is unknown.
        max_lengths: how many averages may be tracked, each a copy of the network in memory.
        batch: images a step; planned times are multiples of it.
        dtype: how files are stored, float16, bfloat16 or float32.

    The error is that of :func:`~edm2_core.ema.reconstruction_error`, profile and rounding together. Source: ours, on
    the inner products of arXiv 2312.02696 Eq. 151.

    Raises:
        InputError: a number out of range, or too few files for one of each length at the end.
    """
    low, high = (float(x) for x in sigma_rel_range)
    _check_request(files, low, high, duration, max_lengths, batch, dtype)
    make: Callable[[tuple[float, ...]], SnapshotPlan]
    if duration is None:
        make = partial(_open_plan, files=files, range_=(low, high), dtype=dtype)
    else:
        make = partial(_timed_plan, files=files, range_=(low, high), dtype=dtype, duration=duration, batch=batch)
    return _best_lengths(make, low, high, min(max_lengths, files if duration is not None else max(files // 2, 1)))


def uniform_plan(*, files: int, duration: int, sigma_rels: Sequence[float] = (0.05, 0.10)) -> TimedPlan:
    """What is usual: all lengths at equal intervals. For comparison."""
    count = max(files // len(sigma_rels), 1)
    times = tuple(round(duration * (i + 1) / count) for i in range(count))
    return TimedPlan(
        duration=duration, sigma_rels=tuple(sigma_rels), times=(times,) * len(sigma_rels), range=(0.01, 0.25)
    )


def worst_error(plan: SnapshotPlan, /) -> float:
    """The largest total error over the plan's range of lengths."""
    return float(plan.error(np.geomspace(*plan.range, 2 * _TARGETS + 1)).total.max())


def plan_from_json(text: str, *, name: str) -> SnapshotPlan:
    """What ``to_json`` wrote; ``name`` is the file's, for errors.

    Raises:
        InputError: no JSON, no plan, a newer version, or times and lengths that no plan has.
    """
    try:
        values = dict(json.loads(text))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        if _whole(version := values.pop("version")) != VERSION:
            raise InputError(f"{name} must be a plan of version {VERSION}, got {version!r}: install a newer edm2")
        values["sigma_rels"] = tuple(map(float, values["sigma_rels"]))
        low, high = map(float, values["range"])
        values["range"] = (low, high)
        if "times" in values:
            values["times"] = tuple(tuple(map(_whole, times)) for times in values["times"])
            plan: SnapshotPlan = TimedPlan(**values | {"duration": _whole(values["duration"])})
        else:
            plan = OpenPlan(**values | {"kept": _whole(values["kept"])})
        _check_plan(plan)
        return plan
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and str(error).startswith(name):
            raise
        why = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name} must be a plan as edm2 plan writes it, got a fault: {why}: make it again") from error


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r}, which is no whole number")
    return value


def _to_json(plan: SnapshotPlan) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(plan)}, indent=1) + "\n"


def _check_request(
    files: int, low: float, high: float, duration: int | None, max_lengths: int, batch: int, dtype: str
) -> None:
    for name, value in (("files", files), ("max_lengths", max_lengths), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}: choose a whole number from 1 on")
    if duration is None and files < 2:
        raise InputError("files must be at least 2 where the end is unknown, got 1: one on the way and one at the end")
    if duration is not None and duration < max(batch, KIMG):
        raise InputError(
            f"duration must be at least {max(batch, KIMG)} images, got {duration}: files are named by thousands"
        )
    for length in (low, high):
        sigma_rel_to_gamma(length)
    if low > high:
        raise InputError(f"a range of lengths must go from the shorter to the longer, got {low:g}-{high:g}: swap them")
    if dtype not in STORAGE:
        raise InputError(f"dtype must be one of {', '.join(STORAGE)}, got {dtype!r}")


def _check_plan(plan: SnapshotPlan) -> None:
    for length in (*plan.sigma_rels, *plan.range):
        sigma_rel_to_gamma(length)
    if len({f"{length:.3f}" for length in plan.sigma_rels}) < len(plan.sigma_rels) or not plan.sigma_rels:
        raise ValueError("lengths that do not differ in their first three digits")
    if plan.range[0] > plan.range[1]:
        raise ValueError(f"a range from {plan.range[0]} to {plan.range[1]}")
    if plan.dtype not in STORAGE:
        raise ValueError(f"dtype {plan.dtype!r}")
    if isinstance(plan, OpenPlan):
        if not (isfinite(plan.ratio) and plan.ratio > 1) or plan.kept < 1:
            raise ValueError(f"ratio {plan.ratio}, kept {plan.kept}")
        return
    if len(plan.times) != len(plan.sigma_rels):
        raise ValueError("another number of lists of times than of lengths")
    for times in plan.times:
        if list(times) != sorted(set(times)) or (times and not 0 < times[0] <= times[-1] <= plan.duration):
            raise ValueError("times that are not in order within the duration")
        if len({time // KIMG for time in times}) < len(times):
            raise ValueError("two times within the same thousand images, which have one file name")
    if not any(plan.duration in times for times in plan.times):
        raise ValueError("no file at the end of the run")


def _error(times: np.ndarray, lengths: np.ndarray, end: float, wanted: np.ndarray, dtype: str) -> ReconstructionError:
    return reconstruction_error(in_time=times, in_sigma_rel=lengths, out_time=end, out_sigma_rel=wanted, dtype=dtype)


def _best_lengths(
    make: Callable[[tuple[float, ...]], SnapshotPlan], low: float, high: float, count: int
) -> SnapshotPlan:
    """The best of the plans that ``make`` gives for ``count`` lengths, by varying one of them at a time."""
    known: dict[tuple[float, ...], tuple[float, SnapshotPlan]] = {}

    def tried(lengths: Sequence[float]) -> tuple[float, SnapshotPlan]:
        key = tuple(sorted({round(min(max(float(s), 0.002), 0.288), 3) for s in lengths}))
        if key not in known:
            plan = make(key)
            known[key] = (worst_error(plan), plan)
        return known[key]

    def descended(lengths: Sequence[float]) -> tuple[float, SnapshotPlan]:
        best = tried(lengths)
        for step in _STEPS:
            while True:
                now = best[1].sigma_rels
                neighbours = ((*now[:i], s * by, *now[i + 1 :]) for i, s in enumerate(now) for by in (step, 1 / step))
                found = min(map(tried, neighbours), key=lambda pair: pair[0])
                if found[0] >= best[0] * (1 - 1e-6):
                    break
                best = found
        return best

    even = np.geomspace(low, high, count + 2)[1:-1] if count < 3 else np.geomspace(low, high, count)
    shorter = [low * (high / low) ** ((i / count) ** 1.5) for i in range(count)]  # where most of the error is
    starts = (even.tolist(), [*shorter[: count - 1], high])
    return min(map(descended, starts), key=lambda pair: pair[0])[1]


def _timed_plan(
    lengths: tuple[float, ...], *, files: int, range_: tuple[float, float], dtype: str, duration: int, batch: int
) -> TimedPlan:
    """The greedy choice for these lengths, cut where more files would not help."""
    times = _candidate_times(duration, batch, range_[0])
    chosen = list(_greedy(times / duration, lengths, np.geomspace(*range_, _TARGETS), files, STORAGE[dtype]))
    base = TimedPlan(duration=duration, sigma_rels=lengths, times=((),) * len(lengths), range=range_, dtype=dtype)
    plans = []
    for count in sorted({len(chosen), ceil(len(chosen) * 0.85), ceil(len(chosen) * 0.7)}):
        some = [sorted(int(times[t]) for t, s in chosen[:count] if s == i) for i in range(len(lengths))]
        plans.append(replace(base, times=tuple(map(tuple, some))))
    # the greedy choice begins where it matters most, at the end of the run; a plan without files there has no value
    return min((plan for plan in plans if plan.stored_at(duration)[0].max() == max(times)), key=worst_error)


def _candidate_times(duration: int, batch: int, shortest: float) -> np.ndarray:
    """Whole steps, dense towards the end on the scale of the shortest length, each in a thousand images of its own."""
    back = duration * np.concatenate([[0], np.geomspace(shortest / 10, 1, _CANDIDATES, endpoint=False)])
    times = np.maximum(np.floor((duration - back) / batch), 1) * batch
    times[0] = duration
    by_name = {int(time) // KIMG: int(time) for time in sorted(times) if time >= KIMG}  # the later takes the name
    return np.array(sorted(by_name.values()), np.float64)


def _greedy(
    times: np.ndarray, lengths: Sequence[float], wanted: np.ndarray, files: int, eps: float
) -> Iterator[tuple[int, int]]:
    """(index of a time, index of a length), the most useful first; at the end of the run for the first of them.

    Orthogonal matching of all wanted profiles at once, on profiles of unit norm. Storage adds to each stored profile
    something independent of all others, of norm eps times the shortest wanted one's: on the diagonal.
    """
    t, s = np.repeat(times, len(lengths)), np.tile(lengths, len(times))
    stored, targets = Profile.power(t, s), Profile.power(np.ones(len(wanted)), wanted)
    gram = stored.take((slice(None), None)) @ stored.take(None)
    dots = stored.take((slice(None), None)) @ targets.take(None)
    norms, sizes = np.sqrt(np.diagonal(gram)), np.sqrt(targets @ targets)
    gram, dots = gram / np.outer(norms, norms), dots / np.outer(norms, sizes)
    left, open_ = np.ones(len(wanted)), np.ones(len(t), bool)
    noise = (eps * sizes.max() / norms) ** 2
    gram[np.diag_indices_from(gram)] += noise
    for count in range(min(files, len(t))):
        rest = np.diagonal(gram)
        usable = open_ & (rest > noise + 1e-10)
        if count == 0:
            usable &= t == times[-1]
        if not usable.any():
            return
        explained = np.where(usable[:, None], dots**2 / np.where(usable, rest, 1)[:, None], 0)
        score = np.sum(np.maximum(left - explained, 0) ** _SHARP, axis=1)
        pick = int(np.argmin(np.where(usable, score, np.inf)))
        column, row = gram[:, pick] / np.sqrt(rest[pick]), dots[pick] / np.sqrt(rest[pick])
        left = np.maximum(left - row**2, 0)
        gram -= np.outer(column, column)
        dots -= np.outer(column, row)
        open_[pick] = False
        yield divmod(pick, len(lengths))


def _open_plan(lengths: tuple[float, ...], *, files: int, range_: tuple[float, float], dtype: str) -> OpenPlan:
    """The best ratio for these lengths: a small one sees the near past well, a large one reaches far back."""
    kept = max(files // len(lengths) - 1, 1)
    ratios = 1 + np.geomspace(0.02, 4, 16)
    plans = (
        OpenPlan(sigma_rels=lengths, ratio=round(float(r), 4), kept=kept, range=range_, dtype=dtype) for r in ratios
    )
    return min(plans, key=worst_error)
