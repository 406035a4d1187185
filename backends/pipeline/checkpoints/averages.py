"""Saving the averages of a tracker, of any network, each in a snapshot; also where processes hold parts of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from edm2_core.ema import Length, StorageDtype
from edm2_core.errors import InputError

from .snapshots import Metadata, tracked_name, write_arrays

Gathered = Iterator[tuple[Length, str, np.ndarray]]
"""Arrays of several averages, in order; each is copied to the host, whole, when it is asked for."""


@dataclass(frozen=True)
class Processes:
    """This process among several: its rank, and a function that returns in each of them what the first passes to it."""

    rank: int
    tell: Callable[[bool], bool]


ALONE = Processes(0, lambda flag: flag)


def save_gathered(
    folder: str | Path,
    gathered: Gathered,
    processes: Processes = ALONE,
    /,
    *,
    time: int,
    kept: Mapping[str, np.ndarray],
    dtype: StorageDtype,
) -> list[Path]:
    """:func:`save_averages` of arrays that ``processes`` gather together; the first of them writes.

    Raises:
        InputError: as :func:`save_averages`, in every process.
    """
    error: Exception | None = None
    paths: list[Path] = []
    if processes.rank == 0:
        groups = groupby(gathered, key=itemgetter(0))
        averages = ((length, ((name, array) for _, name, array in group)) for length, group in groups)
        try:
            paths = save_averages(folder, averages, time=time, kept=kept, dtype=dtype)
        except Exception as failed:
            error = failed
    seen = dict.fromkeys(length for length, _, _ in gathered)  # also after an error: others wait for this process
    failed_there = processes.tell(error is not None)
    if error is not None:
        raise error
    if failed_there:
        raise InputError("averages must be written by the first process, got an error there: see its message")
    return paths or [Path(folder, tracked_name(time, length)) for length in seen]


def save_averages(
    folder: str | Path,
    averages: Iterable[tuple[Length, Iterable[tuple[str, np.ndarray]]]],
    /,
    *,
    time: int,
    kept: Mapping[str, np.ndarray],
    dtype: StorageDtype,
) -> list[Path]:
    """Write one snapshot per (length, pairs of name and array) of ``averages`` into ``folder`` and return their paths.

    For trackers of networks that are not edm2's; ``time`` is in the tracker's unit. ``averages`` and its arrays may be
    generators: they are consumed one by one, and held in ``dtype``. ``kept`` are arrays that are not averaged, which
    each file has as they are.

    Raises:
        InputError: ``time`` is 0, two lengths share a file name, or as :func:`save_snapshot`.
    """
    if time <= 0:
        raise InputError(f"averages must be of a time above 0, got {time}: save them after an update")
    paths: list[Path] = []
    for length, arrays in averages:
        path = Path(folder) / tracked_name(time, length)
        if path in paths:
            raise InputError(
                f"lengths must differ in their third digit to be stored, got {length} besides {path.name}: "
                "track lengths farther apart, such as 0.05 and 0.10"
            )
        metadata = Metadata(config=None, nimg=time, length=length, kept=list(kept))
        write_arrays(path, metadata, chain(arrays, kept.items()), dtype)
        paths.append(path)
    return paths
