"""How is a file written so that no reader ever meets half of it?"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from edm2_core.errors import InputError


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Give ``path`` the bytes that ``write`` puts into the open file, all of them or none.

    They go to a hidden name in the same folder (made if need be), reach the disk, and only then take the name
    ``path``. If anything at all fails, a Ctrl-C included, ``path`` is as it was and the hidden file is gone; a killed
    process may leave the hidden file, which ends in ``.tmp`` and which nobody reads.

    Raises:
        InputError: the operating system refused, for lack of space say. What else ``write`` raises comes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """:func:`write_atomically` of what is all there."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(path, write)


def write_error(path: str | os.PathLike[str], error: OSError) -> InputError:
    """The InputError that says in one line why ``path`` could not be written, how much room there is, what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows knows no quota
        return InputError(
            f"{path} must have room, got '{reason}'{_free(Path(path))}: free some or choose another folder"
        )
    return InputError(f"{path} must be writable, got '{reason}': choose a folder that can be written to")


def _free(path: Path) -> str:
    for folder in path.absolute().parents:  # the nearest that exists
        try:
            return f" with {shutil.disk_usage(folder).free} bytes free"
        except OSError:
            continue
    return ""
