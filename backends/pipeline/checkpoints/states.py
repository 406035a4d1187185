"""States in files: what training resumes from, as one float32 safetensors file.

``params/NAME`` the stored weights, ``adam1/NAME`` and ``adam2/NAME`` the optimizer's moments of trained parameters,
``ema/LENGTH/NAME`` each average; ``nimg`` and ``steps`` in the metadata. Each part is stored in full: none is derived
from another.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from edm2_core.ema import Length, LengthLike
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters, plan
from edm2_core.state import Arrays, State

from .safetensors_io import TensorFile, check_format, read_array, write_tensors

KIND, VERSION = "edm2-state", 1


def parts(state: State, /) -> dict[str, Arrays]:
    """The arrays of ``state`` by the prefix of their names in the file."""
    averages = {_prefix(length): arrays for length, arrays in state.averages.items()}
    return {"params": state.params, "adam1": state.moments1, "adam2": state.moments2, **averages}


def _prefix(length: Length) -> str:
    return f"ema/{length.key}"


def arrays_of(state: State, /) -> dict[str, np.ndarray]:
    """The arrays of ``state`` by their names in the file, float32."""
    return {
        f"{prefix}/{name}": np.asarray(array, np.float32)
        for prefix, part in parts(state).items()
        for name, array in part.items()
    }


def state_of(arrays: Arrays, /, *, nimg: int, steps: int) -> State:
    """The state of these :func:`arrays_of` it."""
    by_prefix: dict[str, dict[str, np.ndarray]] = {"params": {}, "adam1": {}, "adam2": {}}
    for full, array in arrays.items():
        prefix, _, name = full.rpartition("/")
        by_prefix.setdefault(prefix, {})[name] = array
    params, first, second = (by_prefix.pop(prefix) for prefix in ("params", "adam1", "adam2"))
    averages = {Length.of(prefix.removeprefix("ema/")): part for prefix, part in by_prefix.items()}
    return State(params=params, moments1=first, moments2=second, averages=averages, nimg=nimg, steps=steps)


def save_state(path: Path, state: State, /) -> None:
    """Write ``state``, all or nothing. Raises InputError where that fails, for lack of space for example."""
    arrays = arrays_of(state)
    metadata = {"format": KIND, "version": str(VERSION), "nimg": str(state.nimg), "steps": str(state.steps)}
    write_tensors(path, arrays, metadata)


def read_counters(path: Path, /) -> tuple[int, int]:
    """(nimg, steps) of a stored state; reads no array.

    Raises:
        InputError: no such file, cut short, too long, not a safetensors file, not a state, or a newer version.
    """
    return _counters(TensorFile(path))


def _counters(file: TensorFile) -> tuple[int, int]:
    check_format(file, kind=KIND, version=VERSION)
    try:
        return int(file.metadata["nimg"]), int(file.metadata["steps"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{file.path} must have a state's metadata, got a fault: {error}: restore it") from error


def load_state(path: Path, config: NetworkConfig, lengths: Iterable[LengthLike], /) -> State:
    """Read the state of a run of ``config`` that tracks averages of these lengths.

    Raises:
        InputError: as :func:`read_counters`, or the file lacks parts of such a run, or has others.
    """
    file = TensorFile(path)
    nimg, steps = _counters(file)
    averages = {length: _prefix(length) for length in map(Length.of, lengths)}
    stored: dict[str, dict[str, np.ndarray]] = {p: {} for p in ("params", "adam1", "adam2", *averages.values())}
    for full in file.entries:
        prefix, _, name = full.rpartition("/")
        if prefix not in stored:
            raise InputError(
                f"{path} must hold {', '.join(stored)}, got {full}: restore it, or choose another --outdir"
            )
        stored[prefix][name] = read_array(file, full)
    try:
        _check_parts(config, stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return State(
        params=stored["params"],
        moments1=stored["adam1"],
        moments2=stored["adam2"],
        averages={length: stored[prefix] for length, prefix in averages.items()},
        nimg=nimg,
        steps=steps,
    )


def _check_parts(config: NetworkConfig, stored: Mapping[str, Arrays]) -> None:
    constants = {name for name, parameter in plan(config).parameters.items() if not parameter.trained}
    for prefix, arrays in stored.items():
        whole = dict(arrays)
        if prefix.startswith("adam"):
            whole |= {name: stored["params"][name] for name in constants if name in stored["params"]}
        try:
            check_parameters(config, whole)
        except InputError as error:
            raise InputError(f"{prefix}: {error}") from error
