"""Processes that read and decode data: they ignore Ctrl-C, which reaches every process, and end with the one they
serve."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any


def process_pool(workers: int, prepare: Callable[..., None], /, *given: Any) -> ProcessPoolExecutor:
    """A pool of processes, each of which calls ``prepare(*given)`` first.

    They are started afresh: a fork would copy the locks of a framework's threads. So they import the main module anew,
    and a script that uses them must guard its own calls by ``__name__ == "__main__"``.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin, (prepare, given))


def end_processes(pool: ProcessPoolExecutor, /) -> None:
    """Those of a pool that is shut down, whatever they wait for."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def _begin(prepare: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal(SIGINT, SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    prepare(*given)


def _end_with_parent() -> None:
    """Where the parent is killed, no one would tell this process."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
