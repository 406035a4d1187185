"""The device that computes, its arithmetic, compilation, and the processes of a data-parallel group."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from backends.pipeline.runs.fitting import Room
from backends.pipeline.runs.team import Team, meeting
from edm2_core.errors import InputError

PRECISIONS = ("float32", "bfloat16", "float16")
_KEPT = 15  # tensors of the size of a block's output that a step keeps for each block: as in PyTorch, not measured
_BUCKET = 4 << 20  # bytes of gradients per message: MLX's ring has deadlocked on larger ones (mlx#4475)


def choose(name: str | None, /) -> mx.Device:
    """The device called ``name``, gpu or cpu. Default: the gpu where there is one.

    Raises:
        InputError: this machine has no such device.
    """
    available = ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]
    name = available[0] if name is None else name
    if name not in available:
        raise InputError(
            f"--device must be one that is here ({', '.join(available)}), got {name}: leave it out for the fastest"
        )
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu)


def describe(device: mx.Device, /) -> str:
    """Kind, name and memory limit of a device, for the first lines of a command."""
    info, limit = mx.device_info(device), _memory_limit() / 2**30
    return f"{_kind(device)} ({info.get('device_name', info['architecture'])}, memory limit {limit:.1f} GiB)"


def _memory_limit() -> int:
    """Bytes that MLX may allocate. Setting a limit returns the previous one; no getter exists in all versions."""
    limit = mx.set_memory_limit(1 << 50)
    mx.set_memory_limit(limit)
    return int(limit)


def room() -> Room:
    """The memory for a training step in each of the processes that share a batch."""
    return Room(Processes.here().world, _memory_limit() - mx.get_active_memory(), _KEPT)


def _kind(device: mx.Device, /) -> str:
    return "gpu" if device == mx.gpu else "cpu"


def is_slow(device: mx.Device, /) -> bool:
    """Whether matrix products reach only a few GFLOP/s, on one core: on all CPUs but a Mac's, which has Accelerate."""
    return device == mx.cpu and sys.platform != "darwin"


def arithmetic(precision: str, /) -> mx.Dtype:
    """The dtype called ``precision``. Raises InputError unless it is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise InputError(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision}: MLX has no other on its GPU"
        )
    dtype: mx.Dtype = getattr(mx, precision)
    return dtype


def compiled(function: Callable[..., Any], /, **state: Any) -> Callable[..., Any]:
    """``mx.compile(function, **state)`` on a GPU; ``state`` are its ``inputs`` and ``outputs``.

    On a CPU ``function`` itself: there MLX runs a C++ compiler for each shape, and the fused code is no faster.
    """
    return mx.compile(function, **state) if mx.default_device() == mx.gpu else function


def report(name: str | None, /) -> None:
    """Print the device that a command computed on, and MLX's peak memory."""
    print(f"memory   {mx.get_peak_memory() / 2**20:.0f} MiB at the peak, on {describe(choose(name))}")


@dataclass(frozen=True)
class Processes:
    """This process's rank among those that ``mlx.launch`` started, and their number; without it, the only one."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> "Processes":
        """Join the group of processes, if there is one."""
        if "MLX_RANK" not in os.environ:
            return cls()
        with meeting():
            group = mx.distributed.init(strict=True)
        return cls(group.rank(), group.size())

    def average(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """The mean of each array over the processes, in messages of at most :data:`_BUCKET` bytes."""
        if self.world == 1:
            return gradients
        mx.eval(gradients)
        with meeting():
            means = dict(tree_flatten(nn.average_gradients(gradients, all_reduce_size=_BUCKET)))
            mx.eval(means)
        return means

    def mean(self, value: float) -> float:
        """The mean of a number over the processes. All must call it together."""
        if self.world == 1:
            return value
        with meeting():
            return float(mx.distributed.all_sum(mx.array(value))) / self.world

    def team(self) -> Team:
        """The processes, as those that divide the images of a command among them."""
        if self.world == 1:
            return Team()

        def all_gather(data: np.ndarray) -> np.ndarray:
            with meeting():
                return np.array(mx.distributed.all_gather(mx.array(data)[None]))

        return Team(self.rank, self.world, all_gather)
