"""Runs at a URL: training works in a local folder, whose files are copied there as they appear."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from backends.pipeline.checkpoints import states
from backends.pipeline.checkpoints.remote import CACHE, errors_of, fetch, found_at, name_of, open_system
from edm2_core.errors import InputError


def folder_of(url: str, /) -> Path:
    """The local folder of the run at ``url``."""
    return CACHE / "runs" / name_of(url)


def working_copy(url: str, /) -> Path:
    """:func:`folder_of` the run at ``url``, made what is there, if something is, unless it has a later state.

    Raises:
        InputError: the file system does not answer, or a package is missing.
    """
    folder = folder_of(url)
    with errors_of(url):
        system, root = open_system(url)
        there = found_at(system, root)
        own = states.newest(folder / "state")
        own_nimg = states.read_counters(own)[0] if own is not None else -1
        if there and _nimg(there) >= own_nimg:
            fetch(url, folder)
    return folder


def _nimg(there: dict[str, str]) -> int:
    """Images seen by the last state among these files; 0 without one."""
    indices = [name.split("/") for name in there if name.startswith("state/") and name.endswith(f"/{states.INDEX}")]
    return max((int(parts[1]) for parts in indices if parts[1].isdecimal()), default=0)


class Mirror:
    """Copies what is new or changed in ``folder`` to ``url``, and removes there what is gone here; a context manager,
    at whose end all is there.

    Hidden files stay here. The index of a state is copied after its shards, and removed before them, so that a state
    there is whole too.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._copying: Future[None] | None = None
        self._there: dict[str, tuple[int, int]] = {}  # what was copied, by name: size and time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._wait()
        self._pool.shutdown()
        try:
            self._copy()
        except InputError as failed:
            if error is None:
                raise InputError(f"{failed}; the run is in {self._folder}: give the same command again") from failed
            logging.getLogger("edm2").warning(f"not copied: {failed}; the run is in {self._folder}")

    def push(self) -> None:
        """Copy in the background, unless the last copies are still being made. A failure is said; the next try makes up
        for it."""
        if self._copying is None or self._copying.done():
            self._wait()
            self._copying = self._pool.submit(self._copy)

    def _wait(self) -> None:
        try:
            if self._copying is not None:
                self._copying.result()
        except InputError as error:
            logging.getLogger("edm2").warning(f"not copied: {error}; it is tried again")
        self._copying = None

    def _copy(self) -> None:
        with errors_of(self._url):
            system, root = open_system(self._url)
            here = self._here()
            gone = [name for name in found_at(system, root) if name not in here]
            for name, version in sorted(here.items(), key=lambda item: (item[0].endswith(states.INDEX), item[0])):
                if self._there.get(name) == version:
                    continue
                target = f"{root}/{name}"
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
                try:
                    system.put_file(str(self._folder / name), target)
                except FileNotFoundError:
                    continue  # removed meanwhile
                self._there[name] = version
            for name in sorted(gone, key=lambda name: (not name.endswith(states.INDEX), name)):
                system.rm_file(f"{root}/{name}")
                self._there.pop(name, None)

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self._folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                status = path.stat()
                found[path.relative_to(self._folder).as_posix()] = (status.st_size, status.st_mtime_ns)
        return found
