"""The picture drawn when a run ends: the same seeds from the raw weights and from averages of several lengths."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.reconstruct import averages
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import Source
from backends.pipeline.data.datasets import Dataset, to_model
from backends.pipeline.data.labels import one_hot
from backends.pipeline.data.seeds import noise
from backends.ports import OpenSampler
from edm2_core.ema import Length

from .config import TrainConfig
from .folder import Run
from .pictures import save_rows
from .sampling import Job, sample_images

RECONSTRUCTED = (0.02, 0.05, 0.10, 0.15, 0.20)
_WORST_ERROR = 0.5  # lengths whose predicted reconstruction error exceeds this are skipped
_COLUMNS = 10
_MEASURED = 512  # images


def draw_lengths(
    run: Run,
    config: TrainConfig,
    dataset: Dataset,
    raw: Mapping[str, np.ndarray],
    open_sampler: OpenSampler,
    *,
    nimg: int,
) -> tuple[Path, dict[str, float]] | None:
    """Draw ``samples/lengths.png``: a row for the ``raw`` weights, then one for each average, in the order of lengths.

    Averages are the last ones up to ``nimg``, stored or reconstructed; lengths whose predicted reconstruction error
    exceeds 0.5 are skipped. Column k is seed k, with label k if there are labels. Returns the path and each row's
    denoising error; None if there are no averages, or images are neither grey nor RGB.
    """
    sources = [source for source in run.snapshots(config.network) if source.time <= nimg]
    if not sources or config.network.img_channels not in (1, 3):
        return None
    networks = {"raw weights": Snapshot(params=raw, config=config.network, nimg=sources[-1].time, length=None)}
    for length, (snapshot, origin) in sorted(_averages(sources).items()):
        name = f"{length.value:.2f}" if length.relative else str(length)
        networks[f"{name} {origin}"] = snapshot
    sigma = exp(config.hyper.P_mean)
    errors = {name: _error(network, dataset, open_sampler, sigma) for name, network in networks.items()}
    rows = [(f"{name}: {errors[name]:.4f}", _row(network, open_sampler)) for name, network in networks.items()]
    path = run.samples_path / "lengths.png"
    save_rows(path, rows)
    return path, errors


def _averages(sources: Sequence[Source]) -> dict[Length, tuple[Snapshot, str]]:
    """The averages to draw, each with its origin: stored or reconstructed."""
    kept = {source.length: source for source in sources if source.time == sources[-1].time}
    drawn = {length: (source.load(), "stored") for length, source in kept.items()}
    wanted = [s for s in RECONSTRUCTED if Length.of(s) not in kept]
    combination = Combination.of(sources, sigma_rels=wanted)
    errors = combination.error.profile if wanted else ()
    within = [sigma_rel for sigma_rel, error in zip(wanted, errors, strict=True) if error <= _WORST_ERROR]
    reconstructed = zip(within, averages(combination.only(within)) if within else (), strict=True)
    return drawn | {Length.of(sigma_rel): (snapshot, "reconstructed") for sigma_rel, snapshot in reconstructed}


def _row(network: Snapshot, open_sampler: OpenSampler) -> np.ndarray:
    label_dim = network.required_config().label_dim
    columns = min(label_dim, _COLUMNS) or _COLUMNS
    seeds = range(columns)
    job = Job(snapshot=network, seeds=seeds, labels=np.array(seeds if label_dim else [-1] * columns, np.int64))
    return sample_images(job, open_sampler, batch=columns)


def _error(network: Snapshot, dataset: Dataset, open_sampler: OpenSampler, sigma: float) -> float:
    """Root mean square of D(y + n; sigma) - y over the first images, with the same noise for every network.

    A single Euler step from sigma to 0 is the denoiser itself.
    """
    config, seeds = network.required_config(), range(min(_MEASURED, len(dataset)))
    images = to_model(dataset.images(np.array(seeds)))
    labels = one_hot(dataset.labels(np.array(seeds)), config.label_dim) if config.label_dim else None
    sampler = open_sampler(config, network.params)
    squares = 0.0
    for start in range(0, len(seeds), 64):
        part = slice(start, start + 64)
        noisy = images[part] / np.float32(sigma) + noise(seeds[part], images.shape[1:])
        denoised = sampler(noisy, None if labels is None else labels[part], sigmas=(sigma, 0.0))
        squares += float(np.square(denoised - images[part], dtype=np.float64).sum())
    return float(np.sqrt(squares / images.size))
