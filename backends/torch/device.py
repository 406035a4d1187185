"""On which device, and in which process of a data-parallel group, does this command compute?"""

import os
from dataclasses import dataclass

import torch
import torch.distributed

from edm2_core.errors import InputError


def choose(name: str | None, /) -> torch.device:
    """The device called ``name``, or the fastest there is: this process's GPU, then MPS, then CPU.

    Raises:
        InputError: no such device here.
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
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


@dataclass(frozen=True)
class Processes:
    """Which of the processes that ``torchrun`` started this one is; one of one without it."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> "Processes":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else cls()

    def join(self, device: torch.device) -> None:
        """Meet the other processes, once; then collective operations work on ``device``."""
        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` holds in any process. All must call it together."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag), device=device)
        torch.distributed.all_reduce(votes)
        return bool(votes)
