"""The search for the snapshot plan of least error: which averages to store when, within a budget of files.

Snapshots at equal intervals waste space: reconstructing a short average takes files near the end of training, and a
long one hardly more than the last file. A plan for a run of known duration is found greedily: among all pairs (time,
length) that could be stored, take the one that most lowers the residuals of the wanted profiles, subtract what it
explains from all others, and repeat. The tracked lengths, each of which is a copy of the network in memory, are found
by varying a first guess. Candidates are compared by the error of reconstruction, rounding of storage included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np

from ..errors import InputError
from .profiles import Profile, sigma_rel_to_gamma
from .reconstruction import STORAGE, StorageDtype
from .snapshot_plans import KIMG, TARGETS, OpenPlan, SnapshotPlan, TimedPlan, worst_error

_CANDIDATES = 96  # times that may be chosen
_SHARP = 4  # power of the residuals in the score: the largest count most, but not alone
_STEPS = (1.5, 1.2, 1.08)  # factors by which tracked lengths are varied, coarse to fine


def plan_snapshots(
    *,
    files: int,
    sigma_rel_range: tuple[float, float],
    duration: int | None = None,
    max_lengths: int = 3,
    batch: int = 1,
    dtype: StorageDtype = "float16",
) -> SnapshotPlan:
    """A snapshot plan with at most ``files`` files and a small worst error over the range of lengths.

    Args:
        files: how many files may exist at once.
        sigma_rel_range: the shortest and the longest average to be reconstructed.
        duration: of the run, in images; None: its end is unknown.
        max_lengths: how many averages may be tracked, each a copy of the network in memory.
        batch: images per step; planned times are multiples of it.
        dtype: the dtype of stored files, float16, bfloat16 or float32.

    Returns:
        A :class:`TimedPlan`, or an :class:`OpenPlan` where ``duration`` is None.

    The error is that of :func:`~edm2_core.ema.reconstruction_error`, profile and rounding together. Source: ours, on
    the inner products of arXiv 2312.02696 Eq. 151.

    Raises:
        InputError: a number is out of range.

    >>> plan_snapshots(files=4, sigma_rel_range=(0.05, 0.2), duration=1_000_000, max_lengths=2).files
    4
    """
    low, high = (float(x) for x in sigma_rel_range)
    _check_request(files, low, high, duration, max_lengths, batch, dtype)
    make: Callable[[tuple[float, ...]], SnapshotPlan]
    if duration is None:
        make = partial(_open_plan, files=files, range_=(low, high), dtype=dtype)
    else:
        make = partial(_timed_plan, files=files, range_=(low, high), dtype=dtype, duration=duration, batch=batch)
    return _best_lengths(make, low, high, min(max_lengths, files if duration is not None else max(files // 2, 1)))


def _check_request(
    files: int, low: float, high: float, duration: int | None, max_lengths: int, batch: int, dtype: StorageDtype
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


def _best_lengths(
    make: Callable[[tuple[float, ...]], SnapshotPlan], low: float, high: float, count: int
) -> SnapshotPlan:
    """The best of the plans that ``make`` returns for ``count`` lengths, found by varying one length at a time."""
    known: dict[tuple[float, ...], tuple[float, SnapshotPlan]] = {}

    def tried(lengths: Sequence[float]) -> tuple[float, SnapshotPlan]:
        key = tuple(sorted({round(min(max(float(s), 0.002), 0.288), 3) for s in lengths}))
        if key not in known:
            snapshot_plan = make(key)
            known[key] = (worst_error(snapshot_plan), snapshot_plan)
        return known[key]

    def descended(lengths: Sequence[float]) -> tuple[float, SnapshotPlan]:
        best = tried(lengths)
        for step in _STEPS:
            while True:
                now = best[1].sigma_rels
                neighbours = ((*now[:i], s * by, *now[i + 1 :]) for i, s in enumerate(now) for by in (step, 1 / step))
                nearby = min(map(tried, neighbours), key=lambda pair: pair[0])
                if nearby[0] >= best[0] * (1 - 1e-6):
                    break
                best = nearby
        return best

    even = np.geomspace(low, high, count + 2)[1:-1] if count < 3 else np.geomspace(low, high, count)
    shorter = [low * (high / low) ** ((i / count) ** 1.5) for i in range(count)]  # where most of the error is
    starts = (even.tolist(), [*shorter[: count - 1], high])
    return min(map(descended, starts), key=lambda pair: pair[0])[1]


def _timed_plan(
    lengths: tuple[float, ...],
    *,
    files: int,
    range_: tuple[float, float],
    dtype: StorageDtype,
    duration: int,
    batch: int,
) -> TimedPlan:
    """The greedy choice for these lengths, cut short where more files would not lower the error."""
    times = _candidate_times(duration, batch, range_[0])
    chosen = list(_greedy(times / duration, lengths, np.geomspace(*range_, TARGETS), files, STORAGE[dtype]))
    base = TimedPlan(duration=duration, sigma_rels=lengths, times=((),) * len(lengths), range=range_, dtype=dtype)
    candidates = []
    for count in sorted({len(chosen), ceil(len(chosen) * 0.85), ceil(len(chosen) * 0.7)}):
        some = [sorted(int(times[t]) for t, s in chosen[:count] if s == i) for i in range(len(lengths))]
        candidates.append(replace(base, times=tuple(map(tuple, some))))
    usable = (one for one in candidates if one.stored_at(duration)[0].max() == max(times))  # with a file at the end
    return min(usable, key=worst_error)


def _candidate_times(duration: int, batch: int, shortest: float) -> np.ndarray:
    """Times of whole steps, denser towards the end, no two within the same thousand images."""
    back = duration * np.concatenate([[0], np.geomspace(shortest / 10, 1, _CANDIDATES, endpoint=False)])
    times = np.maximum(np.floor((duration - back) / batch), 1) * batch
    times[0] = duration
    by_name = {int(time) // KIMG: int(time) for time in sorted(times) if time >= KIMG}  # the later takes the name
    return np.array(sorted(by_name.values()), np.float64)


def _greedy(
    times: np.ndarray, lengths: Sequence[float], wanted: np.ndarray, files: int, eps: float
) -> Iterator[tuple[int, int]]:
    """Pairs (index of a time, index of a length), the most useful first; the first pair is at the end of the run.

    Orthogonal matching pursuit of all wanted profiles at once, on profiles of unit norm. Rounding of storage adds
    independent noise to each stored profile, of norm eps times that of the shortest wanted one: a term on the diagonal.
    """
    t, s = np.repeat(times, len(lengths)), np.tile(lengths, len(times))
    stored, targets = Profile.power(t, s), Profile.power(np.ones(len(wanted)), wanted)
    gram, dots = stored.outer(stored), stored.outer(targets)
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


def _open_plan(lengths: tuple[float, ...], *, files: int, range_: tuple[float, float], dtype: StorageDtype) -> OpenPlan:
    """The plan of the best ratio for these lengths: small ones resolve the near past, large ones reach far back."""
    kept = max(files // len(lengths) - 1, 1)
    ratios = 1 + np.geomspace(0.02, 4, 16)
    candidates = (
        OpenPlan(sigma_rels=lengths, ratio=round(float(r), 4), kept=kept, range=range_, dtype=dtype) for r in ratios
    )
    return min(candidates, key=worst_error)
