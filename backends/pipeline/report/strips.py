"""What does the length of the average change? The same seeds from averages of many lengths, to slide over."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from math import isfinite

import numpy as np
from PIL import Image

from backends.pipeline.checkpoints.reconstruct import Recipe, reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot
from backends.pipeline.checkpoints.sources import Source, open_sources
from backends.pipeline.runs.exit_codes import missing_framework
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import SampleOptions
from backends.pipeline.runs.sampling import Job, OpenSampler, sample_images, seeds_labels
from edm2_core.errors import InputError

PORTS = ("torch", "jax", "mlx")
LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.13, 0.18, 0.25)
WITHIN = 0.1  # predicted error of an average that is shown without being asked for: beyond, it is of another length
_PIXELATED = 64  # pictures of at most so many pixels a side are kept exactly, larger ones shrunk to twice that
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Strip:
    """What one average makes of the seeds: uint8 [n, channels, height, width]; classes are -1 without labels. A
    traditional average has no ``sigma_rel``."""

    sigma_rel: float | None
    made: str
    images: np.ndarray
    classes: np.ndarray


def open_port(name: str | None, /) -> tuple[str, OpenSampler] | None:
    """The sampler of the port called ``name``, on the fastest device there is; None: of the first that is installed,
    or None. Raises ImportError where the port that was named is not installed."""
    for candidate in PORTS if name is None else (name,):
        try:
            return candidate, import_module(f"backends.{candidate}.sample").open_sampler(SampleOptions())
        except ImportError as error:
            if name is not None or missing_framework(error) is None:
                raise
    return None


def stored_averages(run: Run, /, sigma_rels: Sequence[float]) -> Recipe:
    """How these averages are made of what ``run`` has stored. Raises InputError: nothing is, or it is damaged."""
    stored = run.snapshots()
    if not stored:
        raise InputError(
            f"a run must have snapshots, got none in {run.path}: it stores some every {run.settings().snapshot} images"
        )
    return Recipe.of(open_sources([snapshot.path for snapshot in stored]), sigma_rels=sigma_rels)


def possible(recipe: Recipe, /) -> list[float]:
    """Those of the recipe's lengths, and of those stored last, whose predicted error is at most :data:`WITHIN`."""
    stored = [source.sigma_rel for source in recipe.usable if source.time == recipe.time and source.sigma_rel > 0]
    near = [length for length, e in zip(recipe.lengths, recipe.error.total, strict=True) if e <= WITHIN]
    return sorted({*stored, *near})


def traditional(recipe: Recipe, /) -> list[Source]:
    """The traditional averages stored last."""
    return [source for source in recipe.usable if source.time == recipe.time and isfinite(source.half_life)]


def draw_strips(recipe: Recipe, open_sampler: OpenSampler, *, seeds: Sequence[int], steps: int) -> Iterator[Strip]:
    """A strip for each traditional average stored last, then for each length of ``recipe``, from short to long; memory
    holds one average at a time.

    Raises:
        InputError: pixels that are no colours; files that are damaged.
    """
    config = recipe.sources[0].config
    if config is None or config.img_channels not in (1, 3):
        came = f"{config.img_channels} channels" if config else "a network that is not edm2's"
        raise InputError(f"pictures must be grey or RGB, got {came}: latents must be decoded elsewhere")
    classes = seeds_labels(seeds, config.label_dim)

    def strip(average: Snapshot, sigma_rel: float | None, made: str) -> Strip:
        job = Job(network=average, seeds=seeds, classes=classes, settings={"num_steps": steps})
        images = sample_images(job, open_sampler, batch=_BATCH)
        return Strip(sigma_rel=sigma_rel, made=made, images=images, classes=classes)

    for source in traditional(recipe):
        yield strip(load_snapshot(source.path), None, f"half-life {source.half_life:.10g}, stored")
    if not recipe.lengths:
        return
    errors = dict(zip(recipe.lengths, zip(recipe.error.profile, recipe.error.total, strict=True), strict=True))
    paths = [source.path for source in recipe.sources]
    for sigma_rel in sorted(recipe.lengths):
        (average,) = reconstruct(paths, nimg=recipe.time, sigma_rels=[sigma_rel])
        profile, total = errors[sigma_rel]
        made = f"reconstructed, predicted error {total:.1%}" if profile else "stored"
        yield strip(average, sigma_rel, f"{sigma_rel:g}, {made}")


def picture_url(image: np.ndarray, /) -> str:
    """A picture, uint8 [channels, height, width], as a URL that holds it."""
    made = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    small = is_pixelated(image)
    if not small:
        made.thumbnail((2 * _PIXELATED, 2 * _PIXELATED), Image.Resampling.LANCZOS)
    file = BytesIO()
    made.save(file, format="WEBP", lossless=small, quality=85)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"


def is_pixelated(image: np.ndarray, /) -> bool:
    return max(image.shape[1:]) <= _PIXELATED
