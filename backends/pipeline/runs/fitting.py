"""How many images of a training step fit into the memory of a device, where no option says."""

import os
from dataclasses import dataclass

from edm2_core.network import NetworkConfig, activation_count, parameter_count

_ARRAYS = 8  # of the network's size: weights, gradients, two moments, two averages, normalized weights, room
_PART = 0.7  # of the free memory
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Room:
    """The devices that share a batch, the free bytes of each (None: unknown), and how many tensors of the size of a
    block's output a training step keeps for each block."""

    devices: int
    free: int | None
    kept: float


def step_bytes(config: NetworkConfig, images: int, room: Room, /, *, precision: str) -> int:
    """About how many bytes a training step takes with ``images`` at a time."""
    fixed = 4 * _ARRAYS * parameter_count(config)
    return fixed + round(images * activation_count(config) * _BYTES[precision] * room.kept)


def images_at_a_time(config: NetworkConfig, batch: int, room: Room, /, *, precision: str) -> int | None:
    """The most images per device that fit, in equal parts of its share of ``batch``; None: all, or nothing is known.

    It is an estimate, which leaves three tenths of the free memory. Where even one image does not fit, it is one.
    """
    share, free = batch // room.devices, room.free
    if free is None or batch % room.devices:
        return None
    parts = [n for n in range(1, share + 1) if share % n == 0]
    fitting = [n for n in parts if step_bytes(config, n, room, precision=precision) <= _PART * free]
    most = max(fitting, default=1)
    return None if most == share else most


def free_bytes() -> int | None:
    """The memory of this machine that is free, or can be freed at once; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
