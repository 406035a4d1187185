"""Times in the names of files that do not record them: one pattern for all files of a folder, shown before it is used.

``{time}`` in a pattern is the number, ``*`` anything; ``step*-{time}`` and ``checkpoint-{time}/unet_ema`` for example.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edm2_core.errors import InputError

_TIME = "{time}"


@dataclass(frozen=True)
class NamedTimes:
    """The time of each name, by the pattern that they share."""

    pattern: str
    times: dict[str, int]

    def __str__(self) -> str:
        times = sorted(self.times.values())
        return f"times     in names like {self.pattern}: {times[0]} to {times[-1]}"


def pattern_regex(pattern: str, /) -> re.Pattern[str]:
    """What a pattern matches, with the time as its group. Raises InputError if ``{time}`` is in it twice."""
    parts = [re.escape(part).replace(r"\*", ".*") for part in pattern.split(_TIME)]
    if len(parts) > 2:
        raise InputError(f"--pattern must have one {_TIME}, got {pattern!r}: write * for other numbers")
    return re.compile(r"(\d+)".join(parts))


def named_times(names: Sequence[str], /, *, pattern: str | None, last_time: int | None) -> NamedTimes:
    """The times in ``names``: by ``pattern``, or by the one number that differs between all of them.

    ``last_time`` is that of a single name without a number: the last file of some trainers.

    Raises:
        InputError: names that share no pattern, or more than one; a name without number and no ``last_time``; equal
            times.
    """
    if pattern is None:
        skeletons = {name: re.sub(r"\d+", "#", name) for name in names}
        usual, _ = max(Counter(skeletons.values()).items(), key=lambda item: (item[1], item[0].count("#")))
        numbered = [name for name in names if skeletons[name] == usual]
        pattern = _common_pattern(numbered)
    found = {name: match for name in names if (match := pattern_regex(pattern).fullmatch(name))}
    times = {name: int(match[1]) for name, match in found.items()} if _TIME in pattern else {}
    if others := [name for name in names if name not in times]:
        if len(others) > 1 or last_time is None:
            raise InputError(
                f"names must all have their time, as in {pattern}, got {_some(others)} besides: "
                + ("add --last-time if it is the last" if len(others) == 1 else "give --pattern, or move them away")
            )
        times[others[0]] = last_time
    for time, count in Counter(times.values()).items():
        if count > 1 or not time:
            same = [name for name in names if times[name] == time]
            raise InputError(f"times must differ and be above 0, got {time} in {_some(same)}: give --pattern")
    return NamedTimes(pattern, times)


def _common_pattern(names: Sequence[str]) -> str:
    """The pattern of names that differ only in numbers: the number that varies is the time."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    numbers = range(1, len(pieces[0]), 2)
    varying = [i for i in numbers if len({piece[i] for piece in pieces}) == len(names) > 1] or list(numbers)
    if any(len({piece[i] for piece in pieces}) > 1 for i in set(numbers) - set(varying)):
        varying = list(numbers)  # another number varies too, though not in every name
    candidates = [_with_time(pieces, at) for at in varying]
    if len(candidates) != 1:
        got = f"{_some(names)}, where it may be {' or '.join(map(repr, candidates))}" if candidates else _some(names)
        raise InputError(f"names must show which number is the time, got {got}: give it with --pattern")
    return candidates[0]


def _with_time(pieces: Sequence[Sequence[str]], at: int) -> str:
    """The pattern in which the number ``at`` is the time, and others that vary are ``*``."""
    parts = [
        _TIME if i == at else part if len({piece[i] for piece in pieces}) == 1 else "*"
        for i, part in enumerate(pieces[0])
    ]
    return "".join(parts)


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
