"""The one writer of a folder: a lock that ends with its process, and what dead writers left behind."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from backends.pipeline.checkpoints.atomic import write_bytes, write_error
from backends.pipeline.checkpoints.states import remove_incomplete
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

_LOCK, _HOLDER = ".writer.lock", ".writer.json"
_OWN = ((), ("state",), ("snapshots",))  # folders in which only the writer writes
_OLD = 3600.0  # seconds: other commands' temporary files live for less


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within it, this process is the only one that writes the run in ``folder``. Temporary files of writers that were
    killed are removed.

    The lock is the operating system's, so a dead process holds none; on network file systems without locks it has no
    effect on other hosts.

    Raises:
        InputError: another process holds it; the message says which.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            f"a run must have one writer, got {folder}, which {_holder(folder)} writes: wait for it, or choose another "
            "--outdir"
        ) from error
    except NotImplementedError:
        pass  # the file system has no locks
    except OSError as error:
        raise write_error(folder / _LOCK, error) from error
    try:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        me = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
        write_bytes(folder / _HOLDER, json.dumps(me).encode())
        _remove_remains(folder)
        remove_incomplete(folder / "state")
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(folder: Path) -> bytes:
    """The note of who writes ``folder``; b"" where there is none."""
    try:
        return (folder / _HOLDER).read_bytes()
    except OSError:
        return b""


def _holder(folder: Path) -> str:
    try:
        by = parse_json(holder(folder))
        return f"process {by['process']} on {by['host']} since {by['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove_remains(folder: Path) -> None:
    for path in folder.rglob(".*.tmp"):
        try:
            own = path.parent.relative_to(folder).parts[:1] in _OWN
            if own or time.time() - path.stat().st_mtime > _OLD:
                path.unlink(missing_ok=True)
        except OSError:  # another command has just ended its write
            continue
