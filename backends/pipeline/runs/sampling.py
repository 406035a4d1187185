"""The sample command of every port: loads the network, draws noise and labels from seeds, samples, writes the images.

Noise and labels are drawn on the host, so a seed gives the same image in every port and in any batch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically, write_bytes
from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, snapshot_name
from backends.pipeline.checkpoints.sources import Source
from backends.pipeline.data.datasets import to_uint8
from backends.pipeline.data.labels import check_labels, one_hot
from backends.pipeline.data.seeds import churn_noise, noise
from backends.pipeline.data.seeds import labels as seeded_labels
from backends.ports import Network, OpenSampler
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, parameter_count
from edm2_core.sampler import noise_levels

from .command_line import flag, parse_seeds
from .folder import Run, newest
from .options import SampleOptions
from .pictures import save_grid, save_images
from .progress import Progress

_IN_GRID = 100  # images
_RECORD = "samples.json"
_SOLVER = ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "guide_interval")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines the images.

    ``labels``: class ids, int64 [number of seeds], -1 without labels. ``solver``: options of
    :func:`edm2_core.sampler.sample`, and ``guide_interval``.
    """

    snapshot: Snapshot
    guide: Network | None = None
    guidance: float = 1.0
    seeds: Sequence[int]
    labels: np.ndarray
    solver: Mapping[str, Any] = field(default_factory=dict)


def run_sampling(options: SampleOptions, open_sampler: OpenSampler, *, prog: str) -> None:
    """Sample with ``options``, write the images, and print the network, the guide and the paths.

    Raises:
        InputError: no such run, network, length, seed or class; an option out of range; or a failed write.
    """
    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, got {options.batch}: 64 is the default")
    snapshot, origin, folder = _network(options, train=f"{prog.removesuffix('sample')}train")
    job = _job(options, snapshot)
    channels = snapshot.required_config().img_channels
    if options.format == "png" and channels not in (1, 3):
        raise InputError(f"PNG images must be grey or RGB, got {channels} channels: use --format npz")
    print(f"network  {origin}: {_describe(snapshot)}")
    if job.guidance != 1:
        print(f"guide    {options.guide or 'the same network without its label'}, weight {job.guidance:g}")
    outdir = options.outdir or _default_folder(options, folder)
    if options.format == "png":
        _claim(outdir, _settings(options, snapshot))
    images = sample_images(job, open_sampler, batch=options.batch, shown=True)
    for path in _write(options.format, outdir, job, images):
        print(f"wrote    {path}")


def sample_images(job: Job, open_sampler: OpenSampler, *, batch: int, shown: bool = False) -> np.ndarray:
    """Images, uint8 [n, channels, height, width], one per seed of ``job``, sampled in batches of ``batch``."""
    config = job.snapshot.required_config()
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    sampler = open_sampler(config, job.snapshot.params, guide=job.guide)
    images = np.empty((len(job.seeds), *shape), np.uint8)
    with Progress(total=len(images), shown=shown) as progress:
        for part in _parts(len(images), batch):
            seeds, labels = job.seeds[part], job.labels[part]
            rows = one_hot(labels, config.label_dim) if config.label_dim else None
            churn = (churn_noise(seeds, shape, step=step) for step in count())
            samples = sampler(noise(seeds, shape), rows, guidance=job.guidance, churn_noise=churn, **job.solver)
            images[part] = to_uint8(samples)
            progress.advance(len(seeds))
            progress.report()
    return images


def _parts(total: int, batch: int) -> Iterator[slice]:
    return (slice(start, min(start + batch, total)) for start in range(0, total, batch))


# ---- the network


def stored_network(path: str | Path, /, *, sigma_rel: float | None = None) -> Snapshot:
    """The network in a snapshot file, or the latest average in a run folder.

    Args:
        path: the file or the folder.
        sigma_rel: length of a run's average, reconstructed if it is not stored; None: 0.10 if stored, else the longest.

    Raises:
        InputError: no such file or run, a run without snapshots, or ``sigma_rel`` with a single file.
    """
    if not Path(path).is_dir():
        if sigma_rel is not None:
            raise InputError(f"a single snapshot has one length, got sigma_rel {sigma_rel} for {path}: give the run")
        return load_snapshot(path)
    run = Run(path)
    sources = run.snapshots(run.config().network)
    if not sources:
        raise InputError(f"a run must have snapshots, got none in {run.path}: train it longer")
    return average_of(sources, sigma_rel)[0]


def average_of(sources: Sequence[Source], sigma_rel: float | None, /) -> tuple[Snapshot, Length, bool]:
    """The latest average of a run: the snapshot, its length, and whether it was stored rather than reconstructed."""
    stored = {source.length: source for source in sources if source.time == sources[-1].time}
    default = Length.of(0.10) if Length.of(0.10) in stored else max(stored)
    length = default if sigma_rel is None else Length.of(sigma_rel)
    if length in stored:
        return stored[length].load(), length, True
    (snapshot,) = reconstruct(sources, sigma_rels=[length.value])
    return snapshot, length, False


def _network(options: SampleOptions, *, train: str) -> tuple[Snapshot, str, Path]:
    """(the network, a description of its origin, the folder for its samples)."""
    if options.net is not None:
        if options.run is not None or options.sigma_rel is not None:
            raise InputError("--net excludes --run and --sigma-rel, got one of them too: give --run instead of --net")
        return load_snapshot(options.net), str(options.net), Path("samples")
    if options.sigma_rel is not None:
        Length.of(options.sigma_rel)
    run = Run(newest(train=train) if options.run is None else options.run)
    sources = run.snapshots(run.config().network)
    if not sources:
        raise InputError(
            f"a run must have snapshots, got none in {run.path}: continue it with {train} --outdir {run.path}"
        )
    snapshot, length, is_stored = average_of(sources, options.sigma_rel)
    origin = "stored" if is_stored else f"reconstructed from {len(sources)} snapshots"
    return snapshot, f"{run.path} ({origin})", run.samples_path / Path(snapshot_name(snapshot.nimg, length)).stem


# ---- the job


def _job(options: SampleOptions, snapshot: Snapshot) -> Job:
    config, guidance = snapshot.required_config(), options.guidance
    if options.guide is not None and guidance == 1:
        raise InputError(f"--guide needs a guidance weight other than 1, got {options.guide} alone: add --guidance 2")
    guide = None if options.guide is None else _guide(options.guide, config)
    if guidance != 1 and guide is None and not config.label_dim:
        raise InputError("--guidance of a network without labels needs a guide, got none: name one with --guide")
    seeds = parse_seeds(options.seeds)
    labels = _labels(options.label, seeds, config.label_dim)
    check_labels(config, guide and guide[0], labels, guidance)
    return Job(
        snapshot=snapshot,
        guide=guide,
        guidance=guidance,
        seeds=seeds,
        labels=labels,
        solver=_solver(options),
    )


def _guide(path: Path, config: NetworkConfig) -> Network:
    snapshot = stored_network(path)
    guide = snapshot.required_config()
    for name in ("img_resolution", "img_channels"):
        if (got := getattr(guide, name)) != (need := getattr(config, name)):
            raise InputError(f"--guide must make images of the same shape, got {name} {got} for {need}: choose another")
    if guide.label_dim not in (0, config.label_dim):
        raise InputError(f"--guide must have no classes or {config.label_dim}, got {guide.label_dim}: choose another")
    return guide, snapshot.params


def _labels(label: int | None, seeds: Sequence[int], label_dim: int) -> np.ndarray:
    if label is not None and not label_dim:
        raise InputError(f"--class needs a network with labels, got {label} for one without: leave it out")
    if label is None:
        return labels_of_seeds(seeds, label_dim)
    if not 0 <= label < label_dim:
        raise InputError(f"--class must be from 0 to {label_dim - 1}, got {label}: choose one of these")
    return np.full(len(seeds), label, np.int64)


def labels_of_seeds(seeds: Sequence[int], label_dim: int, /) -> np.ndarray:
    """The class ids drawn from seeds, int64 [n]; -1 without labels. They are the ``labels`` of a :class:`Job`."""
    return seeded_labels(seeds, label_dim) if label_dim else np.full(len(seeds), -1, np.int64)


def _solver(options: SampleOptions) -> dict[str, Any]:
    for name in ("S_churn", "S_min", "S_max", "S_noise"):
        if (value := getattr(options, name)) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, got {value:g}: 0 is none")
    noise_levels(options.steps, sigma_min=options.sigma_min, sigma_max=options.sigma_max, rho=options.rho)
    return {"num_steps": options.steps, **{name: getattr(options, name) for name in _SOLVER}}


# ---- the images


def _default_folder(options: SampleOptions, folder: Path) -> Path:
    """``folder``, with the settings that are not the defaults in its name."""
    usual = SampleOptions()
    name = folder.name
    for field_name, word in (("label", "class"), ("guidance", "guidance"), ("steps", "steps")):
        if (value := getattr(options, field_name)) != getattr(usual, field_name):
            name += f"-{word}{value:g}"
    rest = {n: str(getattr(options, n)) for n in (*_SOLVER, "guide", "precision")}
    if rest != {n: str(getattr(usual, n)) for n in rest}:
        name += f"-{crc32(json.dumps(rest).encode()):08x}"
    return folder.with_name(name)


def _settings(options: SampleOptions, snapshot: Snapshot) -> dict[str, Any]:
    """All that an image depends on, besides its seed."""
    network = 0
    for _, array in sorted(snapshot.params.items()):
        network = crc32(np.ascontiguousarray(array).tobytes(), network)
    names = ("label", "steps", *_SOLVER, "guidance", "guide", "precision")
    return {"network": f"{network:08x}", **{flag(n)[2:]: str(getattr(options, n)) for n in names}}


def _claim(outdir: Path, settings: dict[str, Any]) -> None:
    """Record ``settings`` in the folder, so that images of other settings are never mixed with these. Raises InputError
    where it has such images."""
    path = outdir / _RECORD
    if not path.exists():
        if old := next(outdir.glob("[0-9]*.png"), None):
            raise InputError(
                f"{outdir} must have no images of unknown settings, got {old.name}: choose another --outdir"
            )
        write_bytes(path, json.dumps(settings, indent=1).encode() + b"\n")
        return
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        stored = {}
    for name, value in settings.items():
        if stored.get(name) != value:
            raise InputError(
                f"images in {outdir} must all have the same settings, got {name} {value} for {stored.get(name)}: "
                "choose another --outdir"
            )


def _describe(snapshot: Snapshot) -> str:
    size = f"{parameter_count(snapshot.required_config()) / 1e6:.2f} M parameters"
    length = snapshot.length
    kind = "raw weights" if length is None else f"sigma_rel {length}" if length.relative else str(length)
    return f"{size}, {kind}, after {snapshot.nimg} images"


def _write(kind: str, outdir: Path, job: Job, images: np.ndarray) -> list[Path]:
    if kind == "npz":
        path = outdir / "samples.npz"
        seeds = np.array(job.seeds, np.int64)

        def write(file: BinaryIO) -> None:
            np.savez(file, images=images.transpose(0, 2, 3, 1), labels=job.labels, seeds=seeds)

        write_atomically(path, write)
        return [path]
    save_images(outdir, images, [f"{seed:06d}.png" for seed in job.seeds])
    save_grid(outdir / "grid.png", images[:_IN_GRID])
    return [outdir / "grid.png", outdir / f"{job.seeds[0]:06d}.png ... {job.seeds[-1]:06d}.png"]
