"""Whether memory that this process frees goes back to the system. For glibc; other C libraries are left as they are."""

import ctypes
import platform
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep() -> None:
    """Keep freed memory for the next allocations, from now on: of the main thread, until the process ends.

    By default glibc asks the system for each large array and gives it back when it is freed, and the system fills new
    pages with zeros: in training, those of all activations at every step. Peak memory stays the same; between peaks the
    process holds more.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give memory that is free now back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
