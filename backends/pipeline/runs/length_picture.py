"""What does the length of the average change? A picture at the end: a row for each, the same seeds in all."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.reconstruct import Recipe, reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.data.datasets import Dataset, to_model
from backends.pipeline.data.seeds import noise, one_hot
from edm2_core.ema import HalfLife

from .folder import Run
from .pictures import save_rows
from .sampling import Job, OpenSampler, sample_images

RECONSTRUCTED = (0.02, 0.05, 0.10, 0.15, 0.20)
_FARTHEST = 0.5  # relative L2 distance of a drawn profile from the wanted one; it explains 1 - 0.5^2 of that at least
_COLUMNS = 10
_MEASURED = 512  # images


def draw_lengths(
    run: Run, dataset: Dataset, raw: Mapping[str, np.ndarray], open_sampler: OpenSampler, *, nimg: int | None = None
) -> tuple[Path, dict[str, float]] | None:
    """Draw ``samples/lengths.png``: the ``raw`` weights, then stored and reconstructed averages from short to long; a
    traditional one first.

    Averages are the last ones up to ``nimg``; lengths that what is stored says little of are left out. Column k is seed
    k, with label k where there are labels. Returns the path and each row's denoising error, or None where there is
    nothing to draw: no averages, or pixels that are no colours.
    """
    config = run.settings().network
    stored = [snapshot for snapshot in run.snapshots() if nimg is None or snapshot.nimg <= nimg]
    if not stored or config.img_channels not in (1, 3):
        return None
    kept = {snapshot.sigma_rel: snapshot.path for snapshot in stored if snapshot.nimg == stored[-1].nimg}
    paths = [snapshot.path for snapshot in stored]
    others = _within_reach(paths, [length for length in RECONSTRUCTED if length not in kept])
    averages = dict(zip(others, reconstruct(paths, sigma_rels=others), strict=True)) if others else {}
    networks = {"raw weights": Snapshot(params=raw, config=config, nimg=stored[-1].nimg, sigma_rel=None)}
    for length in sorted({*kept, *averages}, key=lambda s: (not isinstance(s, HalfLife), s)):
        name = str(length) if isinstance(length, HalfLife) else f"{length:.2f}"
        if length in kept:
            networks[f"{name} stored"] = load_snapshot(kept[length])
        else:
            networks[f"{name} reconstructed"] = averages[length]
    sigma = exp(run.settings().P_mean)
    errors = {name: _error(network, dataset, open_sampler, sigma) for name, network in networks.items()}
    rows = [(f"{name}: {errors[name]:.4f}", _row(network, open_sampler)) for name, network in networks.items()]
    path = run.samples_path / "lengths.png"
    save_rows(path, rows)
    return path, errors


def _within_reach(paths: Sequence[Path], lengths: Sequence[float]) -> list[float]:
    """Those whose profile comes near enough to the wanted one."""
    recipe = Recipe.of(open_sources(paths), sigma_rels=lengths)
    return [s for s, far in zip(recipe.lengths, recipe.error.profile, strict=True) if far <= _FARTHEST]


def _row(network: Snapshot, open_sampler: OpenSampler) -> np.ndarray:
    label_dim = network.network.label_dim
    columns = min(label_dim, _COLUMNS) or _COLUMNS
    seeds = range(columns)
    job = Job(network=network, seeds=seeds, classes=np.array(seeds if label_dim else [-1] * columns, np.int64))
    return sample_images(job, open_sampler, batch=columns)


def _error(network: Snapshot, dataset: Dataset, open_sampler: OpenSampler, sigma: float) -> float:
    """Root mean square of D(y + n; sigma) - y over the first images, with the same noise for every network.

    A single Euler step from sigma to 0 is the denoiser itself.
    """
    config, seeds = network.network, range(min(_MEASURED, len(dataset)))
    images = to_model(dataset.images(np.array(seeds)))
    labels = one_hot(dataset.labels(np.array(seeds)), config.label_dim) if config.label_dim else None
    sampler = open_sampler(config, network.params)
    squares = 0.0
    for start in range(0, len(seeds), 64):
        part = slice(start, start + 64)
        noisy = images[part] / np.float32(sigma) + noise(seeds[part], images.shape[1:])
        hot = None if labels is None else labels[part]
        denoised = sampler(noisy, hot, num_steps=1, sigma_max=sigma, sigma_min=sigma / 2)
        squares += float(np.square(denoised - images[part], dtype=np.float64).sum())
    return float(np.sqrt(squares / images.size))
