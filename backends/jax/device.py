"""On which devices does this command compute, and how are batches and parameters laid over them?"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edm2_core.errors import InputError

AXIS = "data"


def join() -> None:
    """Meet the other processes of this job, where ``JAX_COORDINATOR_ADDRESS`` says that there are any.

    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` say how many, and which this one is; on clusters that JAX knows, such
    as Slurm and Cloud TPU, they may be left out.

    Raises:
        InputError: numbers that are none, or a coordinator that nobody is at.
    """
    if not (address := os.environ.get("JAX_COORDINATOR_ADDRESS")):
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


def choose(name: str | None, /) -> list[Any]:
    """The devices of the kind ``name``, cpu, gpu or tpu, as 'gpu:1' one of them; None: all of JAX's own choice.

    Where ``JAX_COMPILATION_CACHE_DIR`` is set, JAX keeps what it compiled there; small programs too.

    Raises:
        InputError: no such device here.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if name is None:
        return list(jax.devices())
    kind, _, index = name.partition(":")
    try:
        found = jax.devices({"cuda": "gpu"}.get(kind, kind))
        return list(found) if not index else [found[int(index)]]
    except (RuntimeError, IndexError, ValueError):
        here = ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
        raise InputError(
            f"--device must be one that is here ({here}), got {name}: leave it out for the fastest"
        ) from None


def describe(devices: Sequence[Any], /) -> str:
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind} ({devices[0].platform}, JAX {jax.__version__})"


def mesh_of(devices: Sequence[Any], /) -> Mesh:
    """All devices in a row: batches are divided along it, and so are parameters that are large enough."""
    return Mesh(np.array(devices), (AXIS,))


def batch_sharding(mesh: Mesh, /) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(AXIS))


def whole(mesh: Mesh, /) -> NamedSharding:
    """All of it on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, state: Any, /, *, least: int = 1 << 16) -> Any:
    """A sharding for each array: along the last axis that the devices divide, if it has ``least`` elements or more;
    whole on every device otherwise."""

    def of(array: Any) -> NamedSharding:
        axes = [a for a in range(array.ndim) if array.shape[a] % mesh.size == 0]
        if mesh.size == 1 or not axes or array.size < least:
            return whole(mesh)
        return NamedSharding(mesh, PartitionSpec(*(AXIS if a == axes[-1] else None for a in range(array.ndim))))

    return jax.tree.map(of, state)
