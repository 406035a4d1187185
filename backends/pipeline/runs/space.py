"""The disk that a run needs, computed before it begins."""

import shutil
from math import ceil, prod
from pathlib import Path

from edm2_core.errors import InputError
from edm2_core.network import plan

from .config import TrainConfig
from .folder import Run

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_BESIDE = 1 << 22  # logs, pictures, headers


def state_bytes(config: TrainConfig, /) -> int:
    """The size of a stored state: weights, averages, and two moments of what is trained, in float32."""
    table = plan(config.network).parameters.values()
    every, trained = (sum(prod(p.shape) for p in table if p.trained or constants) for constants in (True, False))
    return 4 * (every * (1 + len(config.hyper.lengths)) + 2 * trained)


def snapshot_count(config: TrainConfig, /) -> int:
    """The largest number of averages that the run has stored at once."""
    if config.snapshot_plan is not None:
        return config.snapshot_plan.files
    times = ceil(config.hyper.duration / config.hyper.snapshot) if config.hyper.snapshot else 1
    return times * len(config.hyper.lengths)


def needed_bytes(config: TrainConfig, /) -> int:
    """Disk at most: the states that are kept and the one that is being written, and all snapshots."""
    states = (config.keep + 1) * state_bytes(config)
    one = sum(prod(p.shape) for p in plan(config.network).parameters.values()) * _BYTES[config.snapshot_dtype]
    return states + snapshot_count(config) * one + _BESIDE


def check_space(config: TrainConfig, run: Run, /) -> str:
    """What a run needs and what is free, in words. Files that the folder of ``run`` has count as free.

    Raises:
        InputError: less is free there.
    """
    need, free = needed_bytes(config), _free(run.path)
    if free is not None:
        free += sum(path.stat().st_size for path in run.path.rglob("*.safetensors"))
    if free is not None and free < need:
        raise InputError(
            f"a run must have room for its states and snapshots, {shown(need)}, got {shown(free)} free in {run.path}: "
            "free some, choose another --outdir, or store fewer with a longer --snapshot"
        )
    return f"{shown(need)} at most" + ("" if free is None else f", {shown(free)} free")


def _free(folder: Path) -> int | None:
    for path in (folder, *folder.absolute().parents):  # the first that exists
        try:
            return shutil.disk_usage(path).free
        except OSError:
            continue
    return None


def shown(count: int, /) -> str:
    """A number of bytes, in words."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
