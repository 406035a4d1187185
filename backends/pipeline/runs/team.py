"""Processes that divide the images of a command among them."""

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from backends.pipeline.data import patience
from edm2_core.errors import InputError

AllGather = Callable[[np.ndarray], np.ndarray]
"""Of uint8 [n] in each process, [world, n] in all of them; n is the same everywhere."""
_MESSAGE = 1 << 20  # bytes


class PeerLost(InputError):
    """Another process has ended."""


@dataclass(frozen=True)
class Team:
    """This process's ``rank`` among ``world``; by default it is the only one."""

    rank: int = 0
    world: int = 1
    all_gather: AllGather | None = None

    def gather(self, array: np.ndarray, /) -> list[np.ndarray]:
        """The array of each process, of any shapes, in the order of ranks. All must call it together."""
        if self.all_gather is None:
            return [array]
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        sizes = self.all_gather(np.frombuffer(np.int64(len(data)).tobytes(), np.uint8))
        lengths = [int.from_bytes(row.tobytes(), "little") for row in sizes]
        padded = np.zeros(max(lengths), np.uint8)
        padded[: len(data)] = data
        parts = [self.all_gather(padded[i : i + _MESSAGE]) for i in range(0, len(padded), _MESSAGE)]
        rows = np.concatenate(parts, axis=1)
        return [
            np.load(io.BytesIO(row[:length].tobytes()), allow_pickle=False)
            for row, length in zip(rows, lengths, strict=True)
        ]

    def first(self, make: Callable[[], bytes], /) -> bytes:
        """What ``make`` returns in the first process, in all; in the others it is not called.

        Raises:
            InputError: ``make`` raises it; then all do.
        """
        if self.all_gather is None:
            return make()
        message = b""
        if self.rank == 0:
            try:
                message = b"." + make()
            except InputError as error:
                message = b"!" + str(error).encode()
        sizes = self.all_gather(np.frombuffer(np.int64(len(message)).tobytes(), np.uint8))
        data = np.zeros(int.from_bytes(sizes[0].tobytes(), "little"), np.uint8)
        if self.rank == 0:
            data[:] = np.frombuffer(message, np.uint8)
        for start in range(0, len(data), _MESSAGE):
            data[start : start + _MESSAGE] = self.all_gather(data[start : start + _MESSAGE])[0]
        if data[0] == ord("!"):
            raise InputError(data[1:].tobytes().decode())
        return data[1:].tobytes()

    def texts(self, text: str, /) -> list[str]:
        """The text of each process, in the order of ranks. All must call it together."""
        return [row.tobytes().decode() for row in self.gather(np.frombuffer(text.encode(), np.uint8))]

    @property
    def say(self) -> Callable[[str], None]:
        """``print`` in the first process, and nothing in the others: it speaks for all."""
        return print if self.rank == 0 else _silently

    def wait(self) -> None:
        """Wait for all processes."""
        self.gather(np.zeros(0))


@contextmanager
def meeting(*, passes: Callable[[RuntimeError], bool] = lambda _: False) -> Iterator[None]:
    """Within it, wait for the other processes for at most :func:`~backends.pipeline.data.patience.seconds`.

    Frameworks wait longer or without limit, and no exception can interrupt them: after that time the process prints one
    line and exits with status 1.

    ``passes``: whether an error is not of the meeting, and passes.

    Raises:
        PeerLost: another process has ended.
        InputError: the limit is none.
    """
    limit = patience.seconds()

    def give_up() -> None:
        rule = f"error: processes must meet within {limit:g} s, got no answer from another"
        print(f"{rule}: see what it says, or give a longer --timeout", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if passes(error):
            raise
        why = " ".join(str(error).split())
        raise PeerLost(f"all processes must stay until the end, got '{why:.160}': see what the others say") from error
    finally:
        timer.cancel()


def _silently(text: str) -> None:
    pass
