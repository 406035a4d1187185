"""Times in the names of files that do not record them: one pattern for all files of a folder, shown before it is used.

``{time}`` in a pattern is the number, ``*`` anything; ``step*-{time}`` and ``checkpoint-{time}/unet_ema`` for example.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edm2_core.errors import InputError

TIME = "{time}"


@dataclass(frozen=True)
class NamedTimes:
    """The time of each name, by the pattern that they share."""

    pattern: str
    times: dict[str, int]

    def __str__(self) -> str:
        times = sorted(self.times.values())
        return f"times     in names like {self.pattern}: {times[0]} to {times[-1]}"


def pattern_regex(pattern: str, /) -> re.Pattern[str]:
    """What a pattern matches, with the time, a whole number, as its group. Raises InputError if ``{time}`` is in it
    twice."""
    parts = [re.escape(part).replace(r"\*", ".*?") for part in pattern.split(TIME)]
    if len(parts) > 2:
        raise InputError(f"--pattern must have one {TIME}, got {pattern!r}: write * for other numbers")
    return re.compile(r"(\d+)(?!\d)".join(parts))


def named_times(names: Sequence[str], /, *, pattern: str | None, last_time: int | None) -> NamedTimes:
    """The times in ``names``: by ``pattern``, or by the one number that differs between all of them.

    ``last_time`` is that of a single name without a number: the last file of some trainers.

    Raises:
        InputError: names that share no pattern, or more than one; a name without number and no ``last_time``, or a
            ``last_time`` and no such name.
    """
    if pattern is None:
        skeletons = {name: re.sub(r"\d+", "#", name) for name in names}
        usual, _ = max(Counter(skeletons.values()).items(), key=lambda item: (item[1], item[0].count("#")))
        numbered = [name for name in names if skeletons[name] == usual]
        pattern = names[0] if len(names) == 1 and last_time is not None else _common_pattern(numbered)
    found = {name: match for name in names if (match := pattern_regex(pattern).fullmatch(name))}
    times = {name: int(match[1]) for name, match in found.items()} if TIME in pattern else {}
    others = [name for name in names if name not in times]
    if len(others) > 1 or (others and last_time is None):
        last = "--last-time if it is the last, or " if len(others) == 1 else ""
        raise InputError(
            f"names must all have their time, as in {pattern}, got {some(others)} besides: "
            f"give {last}--pattern, or move what is no checkpoint away"
        )
    if last_time is not None:
        if not others:
            raise InputError(f"--last-time is for a name without time, got times in all names, by {pattern}: omit it")
        times[others[0]] = last_time
    return NamedTimes(pattern, times)


def _common_pattern(names: Sequence[str]) -> str:
    """The pattern of names that differ only in numbers: the number that varies is the time."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    numbers = range(1, len(pieces[0]), 2)
    varying = [i for i in numbers if len({piece[i] for piece in pieces}) > 1] or list(numbers)
    candidates = [_with_time(pieces, at) for at in varying]
    if len(candidates) != 1 or len(names) == 1:  # a single name may have the number of a version
        got = f"{some(names)}, where it may be {' or '.join(map(repr, candidates))}" if candidates else some(names)
        ways = "--pattern" + " or --last-time" * (len(names) == 1)
        raise InputError(f"names must show which number is the time, got {got}: give it with {ways}")
    return candidates[0]


def _with_time(pieces: Sequence[Sequence[str]], at: int) -> str:
    """The pattern in which the number ``at`` is the time, and others that vary are ``*``."""
    parts = [
        TIME if i == at else part if len({piece[i] for piece in pieces}) == 1 else "*"
        for i, part in enumerate(pieces[0])
    ]
    return "".join(parts)


def some(names: Sequence[str], /) -> str:
    """The first of ``names``, and how many more there are, for a message."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
