"""The picture drawn when a run ends: the same seeds from the raw weights and from averages of several lengths."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.reconstruct import averages
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import Source
from backends.pipeline.data.batches import prepared, stored_batch
from backends.pipeline.data.datasets import Dataset, held_out
from backends.pipeline.data.seeds import bits, noise
from backends.ports import OpenSampler
from edm2_core.ema import Length

from .config import TrainConfig
from .folder import Run
from .job import Conditions, Job, labels_of_seeds, sample_images
from .pictures import save_rows
from .progress import Progress

RECONSTRUCTED = (0.02, 0.05, 0.10, 0.15, 0.20)
_WORST_ERROR = 0.5  # lengths whose predicted reconstruction error exceeds this are skipped
_COLUMNS, _MEASURED = 10, 512  # seeds drawn, and images that the error is measured on, if there is time
_FEWEST, _LEAST = 2, 32
_SECONDS, _SHARE = 60.0, 0.05  # a picture may take this long, or this part of the time of training
_EVALUATIONS = 63
_OF_TRAINING = 1 / 3  # time of an evaluation over that of training on an image


@dataclass(frozen=True)
class LengthsPicture:
    """What :func:`draw_lengths` made: its file, the denoising error of each row, and what that was measured on."""

    path: Path
    errors: dict[str, float]
    measured_on: str


def draw_lengths(
    run: Run,
    config: TrainConfig,
    dataset: Dataset,
    raw: Mapping[str, np.ndarray],
    open_sampler: OpenSampler,
    *,
    nimg: int,
) -> LengthsPicture | None:
    """Draw ``samples/lengths.png``: a row for the ``raw`` weights, then one for each average, in the order of lengths.

    Averages are the last ones up to ``nimg``, stored or reconstructed; lengths whose predicted reconstruction error
    exceeds 0.5 are skipped. Column k is seed k, with label k if there are labels. The denoising error is measured on a
    sample of the training images, drawn with the seed of the run. Both are smaller where they would take more than a
    minute and a twentieth of the time of training. Shows its progress. Returns None if there are no averages.
    """
    sources = [source for source in run.snapshots(config.network) if source.time <= nimg]
    if not sources:
        return None
    measured, kind = _measured(config, dataset)
    last = Snapshot(params=raw, config=config.network, nimg=sources[-1].time, length=None, data=config.format)
    networks = {"raw weights": last}
    for length, (snapshot, origin) in sorted(_averages(sources).items()):
        name = f"{length.value:.2f}" if length.relative else str(length)
        networks[f"{name} {origin}"] = snapshot
    sigma, (columns, count) = exp(config.hyper.P_mean), _affordable(run, len(networks))
    indices = _drawn(len(measured), count, seed=config.seed)
    errors: dict[str, float] = {}
    rows = []
    print("drawing  the averages of each length; Ctrl-C skips it", file=sys.stderr)
    each = columns + len(indices)
    with Progress(total=each * len(networks)) as progress:
        for name, network in networks.items():
            errors[name] = _error(network, measured, indices, open_sampler, sigma)
            rows.append((f"{name}: {errors[name]:.4f}", _row(network, dataset, open_sampler, columns)))
            progress.advance(each)
            progress.report()
    path = run.samples_path / "lengths.png"
    save_rows(path, rows)
    measured_on = f"{len(indices)} of {len(measured)} {kind} images at sigma {sigma:.2g}, drawn with seed {config.seed}"
    return LengthsPicture(path, errors, measured_on)


def _measured(config: TrainConfig, dataset: Dataset) -> tuple[Dataset, str]:
    """The images that the error is measured on: held-out ones where there are any."""
    kept, held = held_out(dataset, config.holdout, seed=config.seed)
    return (kept, "training") if held is None else (held, "held-out")


def _affordable(run: Run, rows: int) -> tuple[int, int]:
    """Seeds to draw, and images to measure on."""
    last = max(run.log(), key=lambda record: record["nimg"], default=None)
    seconds = last and last.get("seconds")
    if not last or not last["nimg"] or not seconds:
        return _COLUMNS, _MEASURED
    evaluation = _OF_TRAINING * seconds / last["nimg"]
    cost = rows * (_COLUMNS * _EVALUATIONS + _MEASURED) * evaluation
    share = min(1.0, max(_SECONDS, _SHARE * seconds) / max(cost, 1e-9))
    return max(_FEWEST, int(_COLUMNS * share)), max(_LEAST, int(_MEASURED * share))


def _drawn(size: int, count: int, *, seed: int) -> np.ndarray:
    """Indices of ``count`` images, all if there are fewer, drawn without replacement."""
    return np.sort(np.argsort(bits(seed, "denoising error").random_raw(size), kind="stable")[:count])


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


def _row(network: Snapshot, dataset: Dataset, open_sampler: OpenSampler, columns: int) -> np.ndarray:
    """Pictures of the first seeds, seed k of class k; with conditions or label vectors those of sample k."""
    config = network.required_config()
    columns = min(config.label_dim, columns) if config.label_dim and not dataset.vectors else columns
    seeds, given = range(columns), Conditions(dataset)
    labels = np.array(seeds, np.int64) if config.label_dim else labels_of_seeds(seeds, config)
    if config.label_dim and dataset.vectors:
        labels = given.labels(seeds)
    job = Job(snapshot=network, seeds=seeds, labels=labels, conditions=given if config.cond_channels else None)
    return sample_images(job, open_sampler, batch=columns)


def _error(network: Snapshot, dataset: Dataset, indices: np.ndarray, open_sampler: OpenSampler, sigma: float) -> float:
    """Root mean square of D(y + n; sigma) - y over the images at ``indices``, with the same noise for every network.

    A single Euler step from sigma to 0 is the denoiser itself. Of latents, y are the means.
    """
    config, squares = network.required_config(), 0.0
    sampler = open_sampler(config, network.params)
    for start in range(0, len(indices), 64):
        part = indices[start : start + 64]
        images, labels, condition = prepared(stored_batch(dataset, part), dataset.format, label_dim=config.label_dim)
        noisy = images / np.float32(sigma) + noise(range(start, start + len(part)), images.shape[1:])
        given = {} if condition is None else {"condition": condition}
        denoised = sampler(noisy, labels if config.label_dim else None, sigmas=(sigma, 0.0), **given)
        squares += float(np.square(denoised - images, dtype=np.float64).sum())
    return float(np.sqrt(squares / (len(indices) * images[0].size)))
