"""What would an average of another length have been? Computed from stored ones after training.

Each wanted average is a fixed combination of the stored ones (:func:`edm2_core.ema.coefficients`), so however many
are wanted, every file is read once. Time is counted in images.
"""

from collections.abc import Iterable, Sequence
from math import isclose
from pathlib import Path

import numpy as np

from edm2_core.ema import coefficients, sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .runs import Stored
from .snapshots import Snapshot, load_snapshot, read_metadata

_SAME = 1e-6  # lengths that differ by less, relatively, are one


def reconstruct(
    source: str | Path | Iterable[str | Path], /, *, nimg: int | None = None, sigma_rels: Sequence[float]
) -> list[Snapshot]:
    """The averages of the lengths ``sigma_rels`` after ``nimg`` images (None: at the latest snapshot), in that order.

    ``source`` is a run folder, any folder of snapshots, or their paths: averages of one network. An average that is
    stored comes as it is stored; another is the best fit by all that were stored up to ``nimg``, summed in float32
    with float64 coefficients.

    Raises:
        InputError: nothing stored, ``nimg`` before the first snapshot or after the last, a length outside
            (0, 0.2887), or snapshots that are damaged or not of one network.
    """
    for sigma_rel in sigma_rels:
        sigma_rel_to_gamma(float(sigma_rel))
    config, stored = _inventory(source)
    target = _target(nimg, stored)
    usable = [snapshot for snapshot in stored if snapshot.nimg <= target]
    exact = [_find(stored, target, sigma_rel) for sigma_rel in sigma_rels]
    missing = [sigma_rel for sigma_rel, found in zip(sigma_rels, exact, strict=True) if found is None]
    made = iter(_combine(config, usable, target, missing) if missing else ())
    return [next(made) if found is None else load_snapshot(found.path) for found in exact]


def _inventory(source: str | Path | Iterable[str | Path]) -> tuple[NetworkConfig | None, list[Stored]]:
    if isinstance(source, str | Path):
        folder = Path(source)
        folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
        source = sorted(folder.glob("*.safetensors"))
        if not source:
            raise InputError(
                f"a folder must hold snapshots, got none in {folder}: choose a run that has some, or train longer"
            )
    found = [(read_metadata(path), Path(path)) for path in source]
    if not found:
        raise InputError("snapshots to reconstruct from must be one or more, got none: give their paths")
    config = found[0][0].config
    stored = []
    for metadata, path in found:
        if metadata.config != config or metadata.sigma_rel is None:
            raise InputError(
                f"snapshots must be averages of one network, got {path} besides {found[0][1]}: leave one of them out"
            )
        stored.append(Stored(metadata.nimg, metadata.sigma_rel, path))
    return config, sorted(stored)


def _target(nimg: int | None, stored: list[Stored]) -> int:
    first, last = stored[0].nimg, stored[-1].nimg
    if nimg is not None and not first <= nimg <= last:
        raise InputError(
            f"the time of an average must be from {first} to {last} images, got {nimg}: choose one in between"
        )
    return last if nimg is None else nimg


def _find(stored: list[Stored], nimg: int, sigma_rel: float) -> Stored | None:
    same = (s for s in stored if s.nimg == nimg and isclose(s.sigma_rel, sigma_rel, rel_tol=_SAME))
    return next(same, None)


def _combine(config: NetworkConfig | None, stored: list[Stored], nimg: int, sigma_rels: list[float]) -> list[Snapshot]:
    weights = coefficients(
        in_time=np.array([s.nimg for s in stored], np.float64),
        in_sigma_rel=np.array([s.sigma_rel for s in stored]),
        out_time=float(nimg),
        out_sigma_rel=np.array(sigma_rels, np.float64),
    )
    sums: list[dict[str, np.ndarray]] = [{} for _ in sigma_rels]
    for snapshot, row in zip(stored, weights, strict=True):
        for name, array in load_snapshot(snapshot.path).params.items():
            for total, weight in zip(sums, row, strict=True):
                _add(total, name, array, float(weight))
    made = zip(sums, sigma_rels, strict=True)
    return [Snapshot(params=params, config=config, nimg=nimg, sigma_rel=float(length)) for params, length in made]


def _add(total: dict[str, np.ndarray], name: str, array: np.ndarray, weight: float) -> None:
    if np.issubdtype(array.dtype, np.floating):
        total[name] = np.asarray(total.get(name, np.float32(0)) + weight * array, np.float32)
    else:  # a counter, which is not averaged: the latest counts
        total[name] = array
