"""What must a run remember to go on as if it had never stopped? The same parts, under the same names, in every port.

One safetensors file, float32 throughout: ``params/NAME`` the stored weights, ``adam1/NAME`` and ``adam2/NAME`` the
optimizer's moments of what is trained, ``ema/LENGTH/NAME`` each average; ``nimg`` and ``steps`` in the metadata.
Weights, averages and moments are parts of their own: nothing is ever restored from another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters, plan

from .safetensors_io import TensorFile, read_metadata_of, write_tensors

KIND, VERSION = "edm2-state", 1
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class State:
    """A run between two steps. ``averages`` is by sigma_rel or HalfLife; moments are of trained parameters only."""

    params: Arrays
    moments1: Arrays
    moments2: Arrays
    averages: Mapping[float, Arrays]
    nimg: int
    steps: int

    def parts(self) -> dict[str, Arrays]:
        """Each part under the prefix that its arrays have in the file."""
        averages = {f"ema/{sigma_rel!r}": arrays for sigma_rel, arrays in self.averages.items()}
        return {"params": self.params, "adam1": self.moments1, "adam2": self.moments2, **averages}


def save_state(path: Path, state: State, /) -> None:
    """Write ``state``, all or nothing. Raises InputError if that cannot be done, for lack of space say."""
    arrays = {
        f"{prefix}/{name}": np.asarray(array, np.float32)
        for prefix, part in state.parts().items()
        for name, array in part.items()
    }
    metadata = {"format": KIND, "version": str(VERSION), "nimg": str(state.nimg), "steps": str(state.steps)}
    write_tensors(path, arrays, metadata)


def read_counters(path: Path, /) -> tuple[int, int]:
    """(nimg, steps) of a stored state, without reading its arrays.

    Raises:
        InputError: no such file, cut short, too long, no safetensors file, no state, or a newer version.
    """
    text = read_metadata_of(path, kind=KIND, version=VERSION)
    try:
        return int(text["nimg"]), int(text["steps"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} must have a state's metadata, got a fault: {error}: restore it") from error


def load_state(path: Path, config: NetworkConfig, sigma_rels: tuple[float, ...], /) -> State:
    """Read the state of a run of ``config`` that keeps averages of the lengths ``sigma_rels``.

    Raises:
        InputError: as :func:`read_counters`, or parts, names or shapes other than such a run's.
    """
    nimg, steps = read_counters(path)
    averages = {sigma_rel: f"ema/{sigma_rel!r}" for sigma_rel in sigma_rels}
    parts: dict[str, dict[str, np.ndarray]] = {
        prefix: {} for prefix in ("params", "adam1", "adam2", *averages.values())
    }
    file = TensorFile(path)
    for full in file.entries:
        prefix, _, name = full.rpartition("/")
        if prefix not in parts:
            raise InputError(f"{path} must hold {', '.join(parts)}, got {full}: restore it, or choose another --outdir")
        parts[prefix][name] = file.read(full)
    try:
        _check_parts(config, parts)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return State(
        params=parts["params"],
        moments1=parts["adam1"],
        moments2=parts["adam2"],
        averages={sigma_rel: parts[prefix] for sigma_rel, prefix in averages.items()},
        nimg=nimg,
        steps=steps,
    )


def _check_parts(config: NetworkConfig, parts: Mapping[str, Arrays]) -> None:
    constants = {name for name, parameter in plan(config).parameters.items() if not parameter.trained}
    for prefix, arrays in parts.items():
        whole = dict(arrays)
        if prefix.startswith("adam"):
            whole |= {name: parts["params"][name] for name in constants if name in parts["params"]}
        try:
            check_parameters(config, whole)
        except InputError as error:
            raise InputError(f"{prefix}: {error}") from error
