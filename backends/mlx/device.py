"""On which device, and in which process of a data-parallel group, does this command compute?"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from edm2_core.errors import InputError

PRECISIONS = ("float32", "bfloat16", "float16")
_BUCKET = 4 << 20  # bytes of gradients per message: larger ones have been seen to lock up the ring


def choose(name: str | None, /) -> mx.Device:
    """The device called ``name``, gpu or cpu, or the faster there is.

    Raises:
        InputError: no such device here.
    """
    there = ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]
    name = there[0] if name is None else name
    if name not in there:
        raise InputError(
            f"--device must be one that is here ({', '.join(there)}), got {name}: leave it out for the fastest"
        )
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def describe(device: mx.Device, /) -> str:
    info, limit = mx.device_info(device), _memory_limit() / 2**30
    return f"{_kind(device)} ({info.get('device_name', info['architecture'])}, memory limit {limit:.1f} GiB)"


def _memory_limit() -> int:
    """Bytes that MLX may take: what setting the limit answers, in all its versions."""
    limit = mx.set_memory_limit(1 << 50)
    mx.set_memory_limit(limit)
    return int(limit)


def _kind(device: mx.Device, /) -> str:
    return "gpu" if device == mx.gpu else "cpu"


def is_slow(device: mx.Device, /) -> bool:
    """Whether products are MLX's own on Linux, a few GFLOP/s on one core. A Mac's CPU has Accelerate."""
    return device == mx.cpu and sys.platform != "darwin"


def arithmetic(precision: str, /) -> mx.Dtype:
    """The dtype called ``precision``. Raises InputError unless networks can be computed in it here."""
    if precision not in PRECISIONS:
        raise InputError(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision}: MLX has no other on its GPU"
        )
    found: mx.Dtype = getattr(mx, precision)
    return found


def compiled(function: Callable[..., Any], /, **state: Any) -> Callable[..., Any]:
    """``mx.compile`` with ``inputs`` and ``outputs`` named, on a GPU. On a CPU it would start a C++ compiler for each
    shape, if there is one, and what it fuses there is no faster."""
    return mx.compile(function, **state) if mx.default_device() == mx.gpu else function


def report(name: str | None, /) -> None:
    """Say where a command computed, and how much memory MLX took at most."""
    print(f"memory   {mx.get_peak_memory() / 2**20:.0f} MiB at the peak, on {describe(choose(name))}")


@dataclass(frozen=True)
class Processes:
    """Which of the processes that ``mlx.launch`` started this one is; one of one without it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> "Processes":
        """Meet the other processes, if there are any."""
        if "MLX_RANK" not in os.environ:
            return cls()
        with _meeting():
            group = mx.distributed.init(strict=True)
        return cls(group.rank(), group.size())

    def average(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """The mean of each array over the processes, in messages of a few megabytes."""
        if self.world == 1:
            return gradients
        mx.eval(gradients)
        with _meeting():
            found = dict(tree_flatten(nn.average_gradients(gradients, all_reduce_size=_BUCKET)))
            mx.eval(found)
        return found

    def mean(self, value: float) -> float:
        """The mean of a number over the processes. All must call it together."""
        if self.world == 1:
            return value
        with _meeting():
            return float(mx.distributed.all_sum(mx.array(value))) / self.world


@contextmanager
def _meeting() -> Iterator[None]:
    """Wait for the other processes ``EDM2_TIMEOUT`` seconds at most, 300 where it is not set.

    MLX waits for ever inside, where no exception reaches: past the time the process ends itself, with a line.

    Raises:
        InputError: another process is gone.
    """
    seconds = float(os.environ.get("EDM2_TIMEOUT", 300))

    def give_up() -> None:
        rule = f"error: processes must meet within {seconds:g} s, got no answer from another"
        print(f"{rule}: see what it says, or set EDM2_TIMEOUT higher", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"all processes must stay until the end, got '{error}': see what the others say") from error
    finally:
        timer.cancel()
