"""The clock of a tracker: its time after an update, or an error that says how a wrong time came about."""

from ..errors import InputError

LATEST = 1 << 53
"""Times are below this: whole numbers beyond it are not exact in float64."""


def tick(clock: int, /, *, time: float, delta: float) -> int:
    """The clock after an update to ``time``, ``delta`` after the last one.

    Raises:
        InputError: ``time`` or ``delta`` is not a whole number, or out of range; or ``time - delta`` is not ``clock``.

    >>> tick(100, time=110, delta=10)
    110
    """
    for name, value in (("time", time), ("delta", delta)):
        if not 0 < value < LATEST or value != int(value):
            raise InputError(f"{name} must be a whole number from 1 to below 2^53, got {value}: count images or steps")
    time, delta = int(time), int(delta)
    if time - delta == clock:
        return time
    rule = f"time - delta must be the time of the last update, {clock}, got {time} - {delta}: "
    if time <= clock:
        raise InputError(f"{rule}the clock ran back; load the state of the tracker together with that of the model")
    if clock == 0 and time > delta:
        raise InputError(
            f"{rule}this tracker is new; load its state to resume, or construct it with start={time - delta} if the "
            f"weights it was given have been averaged until then, or count time from 0"
        )
    raise InputError(f"{rule}delta is the time since the last update; give delta={time - clock}")


def start_time(start: int, /) -> int:
    """The clock of a tracker before its first update. Raises InputError unless ``start`` is a whole number from 0."""
    if not 0 <= start < LATEST or start != int(start):
        raise InputError(f"start must be a whole number from 0 to below 2^53, got {start}: 0 is a new average")
    return int(start)
