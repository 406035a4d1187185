"""What does the sample command do once a port has brought its sampler? The same for the three ports.

Which network, which seeds and labels, in what batches, and where the images go. Noise and labels come from the seeds
on the host, so a seed means the same image in every port and whatever the batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically
from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, snapshot_name
from backends.pipeline.data.datasets import to_uint8
from backends.pipeline.data.seeds import churn_noise, labels, noise, one_hot, parse_seeds
from edm2_core.ema import HalfLife, sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, parameter_count
from edm2_core.sampler import noise_levels

from .folder import Run, newest
from .options import SampleOptions
from .pictures import save_grid, save_images
from .progress import Progress

_IN_GRID = 100


Network = tuple[NetworkConfig, Mapping[str, np.ndarray]]


class Sampler(Protocol):
    """Float32 noise [N, C, H, W] and one-hot labels [N, label_dim], or None, to float32 images.

    ``steps`` are settings of :func:`edm2_core.sampler.sample`; a guide without classes does without the labels.
    """

    def __call__(
        self,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        guidance: float = ...,
        guide_interval: tuple[float, float] = ...,
        churn_noise: Iterable[np.ndarray] | None = ...,
        **steps: Any,
    ) -> np.ndarray: ...


class OpenSampler(Protocol):
    """What a port brings: it puts a network, and its guide, where they compute. A guide of None is the network itself
    without its label."""

    def __call__(
        self, config: NetworkConfig, params: Mapping[str, np.ndarray], *, guide: Network | None = None
    ) -> Sampler: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides what the images are. ``classes`` is -1 where there is no label."""

    network: Snapshot
    guide: Network | None = None
    guidance: float = 1.0
    seeds: Sequence[int]
    classes: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)


def run_sampling(options: SampleOptions, open_sampler: OpenSampler, *, prog: str) -> None:
    """Sample what ``options`` ask for, write the images, and say on stdout what was used and written.

    Raises:
        InputError: no such run, network, length, seed or class, settings out of range, or nowhere to write.
    """
    batch = 64 if options.batch is None else options.batch
    if batch < 1:
        raise InputError(f"--batch must be at least 1, got {batch}: 64 is the default")
    network, origin, folder = _network(options, train=f"{prog.removesuffix('sample')}train")
    job = _job(options, network)
    outdir = _outdir(options, job, folder)
    kind = options.format or "png"
    if kind == "png" and (channels := network.network.img_channels) not in (1, 3):
        raise InputError(f"PNG images must be grey or RGB, got {channels} channels: use --format npz")
    print(f"network  {origin}: {_describe(network)}")
    if job.guidance != 1:
        print(f"guide    {options.guide or 'the same network without its label'}, weight {job.guidance:g}")
    for path in _write(kind, outdir, job, sample_images(job, open_sampler, batch=batch, shown=True)):
        print(f"wrote    {path}")


def sample_images(job: Job, open_sampler: OpenSampler, *, batch: int, shown: bool = False) -> np.ndarray:
    """uint8 [n, channels, height, width], a row per seed of ``job``, ``batch`` of them at a time."""
    config = job.network.network
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    sampler = open_sampler(config, job.network.params, guide=job.guide)
    images = np.empty((len(job.seeds), *shape), np.uint8)
    with Progress(total=len(images), shown=shown) as progress:
        for part in _parts(len(images), batch):
            seeds, classes = job.seeds[part], job.classes[part]
            hot = one_hot(classes, config.label_dim) if config.label_dim else None
            churn = (churn_noise(seeds, shape, step=step) for step in count())
            made = sampler(noise(seeds, shape), hot, guidance=job.guidance, churn_noise=churn, **job.settings)
            images[part] = to_uint8(made)
            progress.advance(len(seeds))
            progress.report()
    return images


def _parts(total: int, batch: int) -> Iterator[slice]:
    return (slice(start, min(start + batch, total)) for start in range(0, total, batch))


def _network(options: SampleOptions, *, train: str) -> tuple[Snapshot, str, Path]:
    """(the network, where it is from, the folder that samples of it belong in)."""
    if options.net is not None:
        if options.run is not None or options.sigma_rel is not None:
            raise InputError("--net is one stored network, got --run or --sigma-rel too: give --run instead of --net")
        return load_snapshot(options.net), str(options.net), Path("samples")
    if options.sigma_rel is not None:
        sigma_rel_to_gamma(options.sigma_rel)
    run = Run(newest(train=train) if options.run is None else options.run)
    stored = run.snapshots()
    if not stored:
        raise InputError(
            f"a run must have snapshots, got none in {run.path}: {train} --outdir {run.path} goes on with it"
        )
    kept = {snapshot.sigma_rel: snapshot.path for snapshot in stored if snapshot.nimg == stored[-1].nimg}
    length = options.sigma_rel or (0.10 if 0.10 in kept else max(kept))
    if length in kept:
        network, made = load_snapshot(kept[length]), "stored"
    else:
        (network,) = reconstruct([snapshot.path for snapshot in stored], sigma_rels=[length])
        made = f"reconstructed from {len(stored)} snapshots"
    name = Path(snapshot_name(network.nimg, length)).stem
    return network, f"{run.path} ({made})", run.samples_path / name


def _job(options: SampleOptions, network: Snapshot) -> Job:
    guidance = 1.0 if options.guidance is None else options.guidance
    if options.guide is not None and options.guidance is None:
        raise InputError(f"--guide needs a weight, got {options.guide} without one: add --guidance 2, say")
    guide = None if options.guide is None else _guide(options.guide, network.network)
    if guidance != 1 and guide is None and not network.network.label_dim:
        raise InputError("--guidance of a network without labels needs another, got none: name one with --guide")
    seeds = parse_seeds("0-63" if options.seeds is None else options.seeds)
    return Job(
        network=network,
        guide=guide,
        guidance=guidance,
        seeds=seeds,
        classes=_classes(options.label, seeds, network.network.label_dim),
        settings=_settings(options),
    )


def _guide(path: Path, config: NetworkConfig) -> Network:
    snapshot = load_snapshot(path)
    theirs = snapshot.network
    for name in ("img_resolution", "img_channels"):
        if (other := getattr(theirs, name)) != (own := getattr(config, name)):
            raise InputError(f"--guide must make the same images, got {name} {other} instead of {own}: choose another")
    if theirs.label_dim not in (0, config.label_dim):
        raise InputError(f"--guide must have no classes or {config.label_dim}, got {theirs.label_dim}: choose another")
    return theirs, snapshot.params


def _classes(label: int | None, seeds: Sequence[int], label_dim: int) -> np.ndarray:
    if label is not None and not label_dim:
        raise InputError(f"--class needs a network with labels, got {label} for one without: leave it out")
    if label is None:
        return seeds_labels(seeds, label_dim)
    if not 0 <= label < label_dim:
        raise InputError(f"--class must be from 0 to {label_dim - 1}, got {label}: choose one of these")
    return np.full(len(seeds), label, np.int64)


def seeds_labels(seeds: Sequence[int], label_dim: int, /) -> np.ndarray:
    """The class that each seed draws, or -1 where there are no labels: ``classes`` of a :class:`Job`."""
    return labels(seeds, label_dim) if label_dim else np.full(len(seeds), -1, np.int64)


def _settings(options: SampleOptions) -> dict[str, Any]:
    names = ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "guide_interval")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in ("S_churn", "S_min", "S_max", "S_noise"):
        if given.get(name, 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, got {given[name]:g}: 0 is none")
    settings = {"num_steps": 32 if options.steps is None else options.steps, **given}
    levels = {name: settings[name] for name in ("sigma_min", "sigma_max", "rho") if name in settings}
    noise_levels(settings["num_steps"], **levels)
    return settings


def _outdir(options: SampleOptions, job: Job, folder: Path) -> Path:
    if options.outdir is not None:
        return options.outdir
    return folder if job.guidance == 1 else folder.with_name(f"{folder.name}-guidance{job.guidance:g}")


def _describe(network: Snapshot) -> str:
    size = f"{parameter_count(network.network) / 1e6:.2f} M parameters"
    length = network.sigma_rel
    kind = "raw weights" if length is None else str(length) if isinstance(length, HalfLife) else f"sigma_rel {length:g}"
    return f"{size}, {kind}, after {network.nimg} images"


def _write(kind: str, outdir: Path, job: Job, images: np.ndarray) -> list[Path]:
    if kind == "npz":
        path = outdir / "samples.npz"
        seeds = np.array(job.seeds, np.int64)

        def write(file: BinaryIO) -> None:
            np.savez(file, images=images.transpose(0, 2, 3, 1), labels=job.classes, seeds=seeds)

        write_atomically(path, write)
        return [path]
    save_images(outdir, images, [f"{seed:06d}.png" for seed in job.seeds])
    save_grid(outdir / "grid.png", images[:_IN_GRID])
    return [outdir / "grid.png", outdir / f"{job.seeds[0]:06d}.png ... {job.seeds[-1]:06d}.png"]
