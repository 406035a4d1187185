"""Statistics of the features of a set of images, and their files.

A file is an .npz: mean [D], covariance [D, D], count, extractor, weights (the hash of the extractor's network), size
(height and width of the images) and, if they were kept, features [n, D]. Files of others are read too: an .npz with mu
and sigma, and the official .pkl, of which nothing is executed.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.pipeline.checkpoints import inert_pickle
from backends.pipeline.checkpoints.atomic import write_atomically
from backends.pipeline.checkpoints.inert_pickle import Values
from backends.pipeline.data.datasets import Dataset
from edm2_core.errors import InputError
from edm2_core.frechet import Gaussian, Moments

from .extractors import Extractor

_OFFICIAL = {"inception": "fid", "dinov2": "fd_dinov2"}  # names of extractors in official files
Gather = Callable[[np.ndarray], list[np.ndarray]]
"""An array of each process, which may differ in length, in the order of processes, in each of them."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of ``count`` images of ``size`` (height, width; None: not recorded). ``features`` and ``logits`` are float32
    [n, D] if they were kept; ``count`` is None where a file does not say."""

    extractor: str
    weights: str
    gaussian: Gaussian
    count: int | None
    size: tuple[int, int] | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None


def alone(array: np.ndarray) -> list[np.ndarray]:
    """The :data:`Gather` of a single process."""
    return [array]


def collect(
    batches: Iterable[np.ndarray], extractors: Iterable[Extractor], /, *, keep: bool, gather: Gather = alone
) -> dict[str, Statistics]:
    """Statistics of images by extractor, in one pass; batches are uint8 [n, channels, height, width].

    Moments are summed in float64 batch by batch, so memory does not grow with the number of images unless features are
    kept. With several processes, each gives its own batches and gets the statistics of all.

    Raises:
        InputError: fewer than two images, images of mixed size, or features that are not finite.
    """
    sums = {extractor.name: _Sum(extractor, keep) for extractor in extractors}
    size: tuple[int, int] | None = None
    for images in batches:
        here = images.shape[2:]
        if size is not None and here != size:
            raise InputError(f"images must all be of one size, got {here[1]}x{here[0]} among {size[1]}x{size[0]}")
        size = (here[0], here[1])
        for each in sums.values():
            each.add(images)
    return {name: each.statistics(size, gather) for name, each in sums.items()}


class _Sum:
    def __init__(self, extractor: Extractor, keep: bool) -> None:
        self._extractor, self._keep = extractor, keep
        self._moments: Moments | None = None
        self._kept: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []

    def add(self, images: np.ndarray) -> None:
        values, logits = self._extractor.extract(images)
        if not np.isfinite(values).all():
            raise InputError(f"features must be finite, got others of extractor {self._extractor.name}")
        moments = Moments.of(values)
        self._moments = moments if self._moments is None else self._moments.joined(moments)
        if self._keep:
            self._kept.append(values.astype(np.float32))
            self._logits += [] if logits is None else [logits.astype(np.float32)]

    def statistics(self, size: tuple[int, int] | None, gather: Gather) -> Statistics:
        parts = [_unpacked(packed) for packed in gather(_packed(self._moments)) if len(packed)]
        if not parts:
            raise InputError("statistics must be of at least 2 images, got none: give more")
        moments = parts[0]
        for part in parts[1:]:
            moments = moments.joined(part)
        return Statistics(
            extractor=self._extractor.name,
            weights=self._extractor.weights,
            gaussian=moments.gaussian(),
            count=moments.count,
            size=size,
            features=_rows(self._kept, gather),
            logits=_rows(self._logits, gather),
        )


def _rows(parts: list[np.ndarray], gather: Gather) -> np.ndarray | None:
    return np.concatenate([rows for rows in gather(np.concatenate(parts)) if len(rows)]) if parts else None


def _packed(moments: Moments | None) -> np.ndarray:
    if moments is None:
        return np.empty(0)
    return np.concatenate([[moments.count], moments.mean, moments.scatter.ravel()])


def _unpacked(packed: np.ndarray) -> Moments:
    width = int(np.sqrt(len(packed)))  # 1 + D + D^2
    mean, scatter = packed[1 : width + 1], packed[width + 1 :]
    return Moments(int(packed[0]), mean, scatter.reshape(width, width))


# ---- files


def is_statistics(path: Path, /) -> bool:
    """Whether the file at ``path`` holds statistics rather than images."""
    if path.suffix.lower() == ".pkl":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return path.suffix.lower() == ".npz" and bool(names & {"mu.npy", "mean.npy"})


def save(path: Path, statistics: Statistics, /) -> None:
    """Write statistics, all or nothing."""
    arrays: dict[str, Any] = {
        "mean": statistics.gaussian.mean,
        "covariance": statistics.gaussian.covariance,
        "count": statistics.count or 0,
        "extractor": statistics.extractor,
        "weights": statistics.weights,
        "size": statistics.size or (0, 0),
    }
    if statistics.features is not None:
        arrays["features"] = statistics.features
    write_atomically(path, lambda file: np.savez(file, **arrays))


def load(path: Path, extractor: Extractor, /) -> Statistics:
    """The statistics in a file, for figures of ``extractor``.

    Raises:
        InputError: no such file, one that is damaged, or statistics of another extractor, or of other weights.
    """
    stored = _from_pickle(path, extractor.name) if path.suffix.lower() == ".pkl" else _from_npz(path)
    name, weights = str(stored.get("extractor", extractor.name)), str(stored.get("weights", extractor.weights))
    if name != extractor.name:
        raise InputError(f"{path} must be statistics of {extractor.name}, got those of {name}: measure the data anew")
    if weights != extractor.weights:
        raise InputError(
            f"{path} must be statistics of the same weights, got SHA-256 {weights[:8]} for {extractor.weights[:8]}: "
            "measure the data anew, or give those weights"
        )
    mean, covariance = (np.asarray(stored[key], np.float64) for key in ("mean", "covariance"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(f"{path} must hold mean [D] and covariance [D, D], got {mean.shape} and {covariance.shape}")
    height, width = (int(side) for side in stored.get("size", (0, 0)))
    return Statistics(
        extractor=name,
        weights=weights,
        gaussian=Gaussian(mean, covariance),
        count=int(stored.get("count", 0)) or None,
        size=(height, width) if height else None,
        features=stored.get("features"),
    )


def _from_npz(path: Path) -> Mapping[str, Any]:
    names = {"mu": "mean", "sigma": "covariance"}
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            stored = {names.get(name, name): file[name] for name in file.files}
        return {"mean": stored.pop("mean"), "covariance": stored.pop("covariance"), **stored}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} must hold mean and covariance, or mu and sigma, got '{error}'") from error


def _from_pickle(path: Path, extractor: str) -> Mapping[str, Any]:
    content = inert_pickle.load(path)
    official = _OFFICIAL.get(extractor, extractor)
    part = content.get(official) if isinstance(content, Mapping) else None
    if not isinstance(part, Mapping) or not {"mu", "sigma"} <= part.keys():
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{path} must hold mu and sigma of {official}, got {names:.80}: choose another metric or file")
    mean, covariance = (value.array if isinstance(value, Values) else value for value in (part["mu"], part["sigma"]))
    return {"mean": mean, "covariance": covariance}


def batches_of(
    dataset: Dataset, /, *, batch: int, most: int | None = None, rank: int = 0, world: int = 1
) -> Iterator[np.ndarray]:
    """The images of a dataset, in its order; of several processes each reads its own batches.

    Raises:
        InputError: samples that are not 8-bit images.
    """
    if dataset.format.codec.stored != "uint8":
        raise InputError(f"images to measure must be 8-bit, got other data in {dataset.spec}: decode them first")
    count = len(dataset) if most is None else min(most, len(dataset))
    for start in range(rank * batch, count, world * batch):
        yield dataset.read(np.arange(start, min(start + batch, count)))
