"""Strips: images of the same seeds from averages of many lengths, which the report's slider moves over."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO

import numpy as np
from PIL import Image

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.reconstruct import WITHIN, averages
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import Source
from backends.pipeline.runs.exit_codes import missing_framework
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.job import job_of_run, sample_images
from backends.pipeline.runs.options import SampleOptions
from backends.ports import OpenSampler
from edm2_core.ema import Length
from edm2_core.errors import InputError

from .history import History

PORTS = ("torch", "jax", "mlx")
LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.13, 0.18, 0.25)
_PIXELATED = 64  # images of at most so many pixels a side are kept exactly, larger ones shrunk to twice that
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The images of one average, uint8 [n, 1 or 3, height, width], and the name of each one's class, "" without."""

    length: Length
    caption: str
    images: np.ndarray
    classes: Sequence[str]


def open_port(name: str | None, /) -> tuple[str, OpenSampler] | None:
    """The name and the sampler of a port, on its fastest device; None: of the first that is installed, if any is.

    Raises:
        ImportError: the port ``name`` is not installed.
    """
    for candidate in PORTS if name is None else (name,):
        try:
            return candidate, import_module(f"backends.{candidate}.sample").open_sampler(SampleOptions())
        except ImportError as error:
            if name is not None or missing_framework(error) is None:
                raise
    return None


def combine(history: History, /, sigma_rels: Sequence[float] | None) -> Combination:
    """The averages of a run at its latest snapshot: of these lengths, or of :data:`LENGTHS` and those stored.

    Raises:
        InputError: no snapshots, or a damaged one.
    """
    run, config = history.run, history.config
    if not (sources := run.snapshots(config.network)):
        every = config.hyper.snapshot
        raise InputError(f"a run must have snapshots, got none in {run.path}: it stores some every {every} images")
    stored = (source.length.value for source in _latest(sources) if source.length.relative)
    return Combination.of(sources, sigma_rels=sigma_rels or sorted({*LENGTHS, *stored}))


def within_error(combination: Combination, /) -> list[float]:
    """Its lengths whose predicted error is at most :data:`WITHIN`."""
    return [length for length, e in zip(combination.lengths, combination.error.total, strict=True) if e <= WITHIN]


def traditional(combination: Combination, /) -> list[Source]:
    """The traditional averages at the latest snapshot."""
    return [source for source in _latest(combination.sources) if not source.length.relative]


def _latest(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.time == sources[-1].time]


def draw_strips(
    combination: Combination, run: Run, open_sampler: OpenSampler, *, seeds: Sequence[int], steps: int
) -> Iterator[Strip]:
    """A strip for each traditional average, then for each length of ``combination``, short to long, one by one.

    Raises:
        InputError: damaged files, or conditions that are no longer where the run had them.
    """

    def strip(snapshot: Snapshot, length: Length, made: str) -> Strip:
        job = job_of_run(snapshot, run, seeds=seeds, solver={"num_steps": steps})
        images = sample_images(job, open_sampler, batch=_BATCH)
        names = snapshot.data.classes if snapshot.data is not None else ()
        ids = job.labels.tolist() if job.labels.ndim == 1 else [-1] * len(seeds)
        classes = ["" if i < 0 else f"class {i}" if not names else str(names[i]) for i in ids]
        return Strip(length=length, caption=f"{length}, {made}", images=images, classes=classes)

    for source in traditional(combination):
        yield strip(source.load(), source.length, "stored")
    for sigma_rel in sorted(combination.sigma_rels):
        one = combination.only([sigma_rel])
        (average,) = averages(one)
        exact = not one.error.profile[0]
        made = "stored" if exact else f"reconstructed, predicted error {one.error.total[0]:.1%}"
        yield strip(average, Length.of(sigma_rel), made)


def picture_url(image: np.ndarray, /) -> str:
    """An image, uint8 [channels, height, width], as a data URL."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = is_pixelated(image)
    if not small:
        picture.thumbnail((2 * _PIXELATED, 2 * _PIXELATED), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, format="WEBP", lossless=small, quality=85)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"


def is_pixelated(image: np.ndarray, /) -> bool:
    """Whether an image is small enough to be enlarged pixel by pixel."""
    return max(image.shape[1:]) <= _PIXELATED
