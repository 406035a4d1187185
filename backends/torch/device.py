"""The device to compute on, and this process's place among those that share a batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed

from backends.pipeline.runs.exit_codes import end_at_once
from backends.pipeline.runs.fitting import Room, free_bytes
from backends.pipeline.runs.team import Team, meeting
from edm2_core.errors import InputError

_KEPT = 15  # tensors of the size of a block's output that a step keeps for each block: 12 to 15 were measured


def choose(name: str | None, /) -> torch.device:
    """The device ``name``; None: the fastest available, which is this process's GPU, then MPS, then the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    accelerators = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, there in accelerators.items() if there)
    kind = name.partition(":")[0]
    try:
        if not accelerators.get(kind, False):
            raise RuntimeError
        device = torch.device(name)
        if kind == "cuda":
            device = device if device.index is not None else torch.device("cuda", Processes.here().local_rank)
            torch.cuda.set_device(device)
    except RuntimeError:
        here = ", ".join(kind for kind, there in accelerators.items() if there)
        raise InputError(
            f"--device must be one that is here ({here}), got {name}: leave it out for the fastest"
        ) from None
    return device


def describe(device: torch.device, /) -> str:
    """The device in words, such as ``cuda:0 (NVIDIA H100)`` or ``cpu (8 threads)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def fastest_precision(device: torch.device, /) -> Literal["float32", "bfloat16"]:
    """The dtype of activations that ``device`` computes fastest in and that trains as well as float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def allow_tf32(device: torch.device, /) -> None:
    """Let CUDA compute float32 products in TF32, which has 10 bits of mantissa: for training."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def room(device: torch.device, /) -> Room:
    """The memory for a training step on each of the devices that share a batch."""
    world = Processes.here().world
    if device.type == "cuda":
        return Room(world, torch.cuda.mem_get_info(device)[0], _KEPT)
    free = free_bytes()
    return Room(world, None if free is None else free // world, _KEPT)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, float32 is computed in float32, not in TF32, whose 10 bits of mantissa would show: a seed gives the
    same image in every port."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = False
    try:
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        ):
            yield
    finally:
        products.allow_tf32 = before


@dataclass(frozen=True)
class Processes:
    """This process's rank among the ``world`` processes that ``torchrun`` started; without it, the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> "Processes":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else cls()

    def join(self, device: torch.device) -> None:
        """Open the group of processes, once; afterwards collective operations work on ``device``."""
        if self.world > 1 and not torch.distributed.is_initialized():
            end_at_once()
            with meeting():
                torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def mean(self, value: float) -> float:
        """The mean of ``value`` over all processes, which must call this together. It waits for no device."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)  # on the CPU, so sent between hosts
        with meeting():
            torch.distributed.all_reduce(total)
        return float(total) / self.world

    def team(self, device: torch.device) -> Team:
        """The processes, as those that divide the images of a command among them."""
        if self.world == 1:
            return Team()
        self.join(device)

        def all_gather(data: np.ndarray) -> np.ndarray:
            mine = torch.from_numpy(data.copy()).to(device)
            rows = [torch.empty_like(mine) for _ in range(self.world)]
            with meeting():
                torch.distributed.all_gather(rows, mine)
                return torch.stack(rows).cpu().numpy()

        return Team(self.rank, self.world, all_gather)
