"""Atomic writes: a file is there whole or not at all, whatever stops the process that writes it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from edm2_core.errors import InputError


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Replace ``path`` by what ``write`` puts into the open file.

    The bytes go to a hidden file in the same folder (created if needed), are flushed to the disk, and the file is then
    renamed to ``path``. On any error, Ctrl-C included, ``path`` is unchanged and the hidden file is removed. A killed
    process may leave the hidden file, whose name ends in ``.tmp``; no command reads it.

    Raises:
        InputError: the operating system refuses, for lack of space for example. Other exceptions of ``write`` pass
            through.
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
            sync_folder(path.parent)
        finally:
            if os.path.lexists(temporary):
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Flush the names of the files in ``folder`` to the disk, so that a renamed file survives a loss of power.

    Raises:
        OSError: the operating system refuses. Systems that cannot open a folder keep names by themselves.
    """
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` by :func:`write_atomically`."""

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(path, write)


def write_error(path: str | os.PathLike[str], error: OSError) -> InputError:
    """The InputError for a failed write to ``path``: the reason, the free space where that ran out, what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows has no quota
        return InputError(
            f"{path} must have room, got '{reason}'{_free(Path(path))}: free some or choose another folder"
        )
    return InputError(f"{path} must be writable, got '{reason}': choose a folder that can be written to")


def _free(path: Path) -> str:
    for folder in path.absolute().parents:  # the first that exists
        try:
            return f" with {shutil.disk_usage(folder).free} bytes free"
        except OSError:
            continue
    return ""
