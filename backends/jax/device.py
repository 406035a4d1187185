"""Devices, and how batches and parameters are distributed over them."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from backends.pipeline.runs import team as teams
from backends.pipeline.runs.fitting import Room, free_bytes
from backends.pipeline.runs.networks import CACHE
from backends.pipeline.runs.team import Team
from edm2_core.errors import InputError

AXIS = "data"
# Tensors of the size of a block's output that a step keeps for each block: on a CPU 20 were measured among its buffers,
# and the process takes half as much again. With recomputed activations it is 13.
_KEPT = 30
SAMPLING_MATMUL = "highest"
"""Precision of matrix products wherever images are made: float32, so that a seed gives the same image in every port.

Training takes JAX's default, which is faster and less exact on GPUs (TF32) and TPUs (bfloat16).
"""


def join() -> None:
    """Connect to the other processes of this job, once, where ``JAX_COORDINATOR_ADDRESS`` is set.

    ``JAX_NUM_PROCESSES`` is their number and ``JAX_PROCESS_ID`` the index of this one; on clusters that JAX knows, such
    as Slurm and Cloud TPU, they may be left out.

    Raises:
        InputError: JAX_NUM_PROCESSES or JAX_PROCESS_ID is not an integer, or the coordinator does not answer.
    """
    if not (address := os.environ.get("JAX_COORDINATOR_ADDRESS")) or jax.distributed.is_initialized():
        return
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    try:
        jax.distributed.initialize(address, int(count) if count else None, int(index) if index else None)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"processes must meet at JAX_COORDINATOR_ADDRESS {address}, got '{why}': "
            "set JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0 on"
        ) from error


def is_out_of_memory(error: Exception, /) -> bool:
    """Whether the memory of a device is exhausted."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextmanager
def meeting() -> Iterator[None]:
    """:func:`backends.pipeline.runs.team.meeting`, which ends this process with its line when another has ended: JAX
    would wait for that one at the exit, for a minute, and then abort."""
    try:
        with teams.meeting(passes=is_out_of_memory):
            yield
    except InputError as error:
        print("error:", error, file=sys.stderr, flush=True)
        os._exit(2)


def team() -> Team:
    """The processes of this job, as those that divide the images of a command among them; see :func:`join`."""
    join()
    if jax.process_count() == 1:
        return Team()

    def all_gather(data: np.ndarray) -> np.ndarray:
        with meeting():
            return np.asarray(multihost_utils.process_allgather(data))

    return Team(jax.process_index(), jax.process_count(), all_gather)


def choose(name: str | None, /) -> list[Any]:
    """The devices of a kind: ``name`` is cpu, gpu or tpu, or one of them as in gpu:1. None: JAX's default devices.

    Compiled programs are kept in ~/.cache/edm2/jax, unless ``JAX_COMPILATION_CACHE_DIR`` names another folder. From the
    first use of JAX on, programs for the CPU run on the thread that calls them.

    Raises:
        InputError: this machine has no such device.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # freed_memory.keep works on the main thread only
    if name is None:
        return list(jax.devices())
    kind, _, index = name.partition(":")
    try:
        of_kind = jax.devices({"cuda": "gpu"}.get(kind, kind))
        return [of_kind[int(index)]] if index else list(of_kind)
    except (RuntimeError, IndexError, ValueError):
        here = ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
        raise InputError(
            f"--device must be one that is here ({here}), got {name}: leave it out for the fastest"
        ) from None


def room(name: str | None, /) -> Room:
    """The memory for a training step on each of the devices of :func:`choose`."""
    devices = choose(name)
    stats = choose_one(name).memory_stats() or {}
    if "bytes_limit" in stats:
        return Room(len(devices), stats["bytes_limit"] - stats.get("bytes_in_use", 0), _KEPT)
    free = free_bytes()
    return Room(len(devices), None if free is None else free // len(devices), _KEPT)


def choose_one(name: str | None, /) -> Any:
    """The first device of this process among those of :func:`choose`."""
    return next(device for device in choose(name) if device.process_index == jax.process_index())


def fastest_precision(device: Any, /) -> Literal["float32", "bfloat16"]:
    """The dtype of activations that ``device`` computes fastest in and that trains as well as float32."""
    if device.platform == "gpu":
        major = str(getattr(device, "compute_capability", "")).partition(".")[0]  # of AMD's GPUs a name
        return "bfloat16" if major.isdecimal() and int(major) >= 8 else "float32"
    return "bfloat16" if device.platform == "tpu" else "float32"


def describe(devices: Sequence[Any], /) -> str:
    """In words, as the train command prints them."""
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind} ({devices[0].platform}, JAX {jax.__version__})"


def mesh_of(devices: Sequence[Any], /) -> Mesh:
    """All devices along one axis: batches are divided along it, and so are parameters that are large enough."""
    return Mesh(np.array(devices), (AXIS,))


def batch_sharding(mesh: Mesh, /) -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def whole(mesh: Mesh, /) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any, /, *, least: int = 1 << 16) -> Any:
    """A sharding for each array: over the last axis whose size the number of devices divides, if the array has
    ``least`` elements or more; otherwise a copy on every device."""

    def of(array: Any) -> NamedSharding:
        axes = [a for a in range(array.ndim) if array.shape[a] % mesh.size == 0]
        if mesh.size == 1 or not axes or array.size < least:
            return whole(mesh)
        return NamedSharding(mesh, PartitionSpec(*(AXIS if a == axes[-1] else None for a in range(array.ndim))))

    return jax.tree.map(of, state)


def gathered(array: Any, /) -> np.ndarray:
    """The whole of ``array`` on the host, in every process; all must call it where other processes hold parts of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
