"""How long a process waits, for others or for data, before it ends with an error."""

import os
from math import isfinite

from edm2_core.errors import InputError

_VARIABLE = "EDM2_TIMEOUT"
_given: float | None = None


class Unanswered(InputError):
    """Something does not answer, and a thread that waits for it cannot be ended: the process must be."""


def seconds() -> float:
    """The limit, in seconds: that of :func:`set_seconds`, else the environment's EDM2_TIMEOUT, else 300.

    Raises:
        InputError: it is not a number above 0.
    """
    return _checked(os.environ.get(_VARIABLE, "300")) if _given is None else _given


def set_seconds(limit: float | None, /) -> None:
    """Make ``limit`` that of this process; None: leave it to the environment. Raises InputError as :func:`seconds`."""
    global _given
    _given = None if limit is None else _checked(str(limit))


def _checked(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = 0
    if not (limit > 0 and isfinite(limit)):
        raise InputError(f"--timeout and {_VARIABLE} must be a number of seconds above 0, got {text!r}: correct it")
    return limit
