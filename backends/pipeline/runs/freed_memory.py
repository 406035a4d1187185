"""What becomes of memory that this process frees: glibc's part of it; other C libraries are left as they are."""

import ctypes
import platform
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep() -> None:
    """From now on, keep it for what is allocated next.

    By default glibc maps every large array anew and gives it back to the system, which fills its pages with zeros each
    time: in training, those of all activations at every step. The peak is no higher; between peaks the process holds
    what it needed at the last. It is so for what the main thread allocates, until the process ends.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give what is free now to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
