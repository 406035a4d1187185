"""The sample command of every port: loads the network, draws noise and labels from seeds, samples, writes the images.

Noise and labels are drawn on the host, so a seed gives the same image in every port and in any batch.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, snapshot_name
from backends.pipeline.checkpoints.sources import Source
from backends.pipeline.data.datasets import Dataset, open_dataset
from backends.pipeline.data.labels import check_labels, one_hot
from backends.pipeline.data.seeds import churn_noise, noise
from backends.pipeline.data.seeds import labels as seeded_labels
from backends.ports import Network, OpenSampler
from edm2_core.codec import PIXELS, Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, parameter_count
from edm2_core.sampler import noise_levels

from . import outputs, shipped
from .command_line import flag, parse_seeds
from .folder import Run, any_run, newest
from .options import SampleOptions
from .pictures import visible
from .progress import Progress

_RECORD = "samples.json"
OpenDecoder = Callable[[str, str | None, bool], "outputs.Decode"]
"""(an autoencoder's name or folder, device, only if it is on this machine) -> latents to images."""
_SOLVER = ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "guide_interval")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines the images.

    ``labels``: class ids, int64 [number of seeds], -1 without labels; or label vectors, float32 [number of seeds,
    label_dim]. ``conditions``: of seeds, those of the images, as the network sees them. ``solver``: options of
    :func:`edm2_core.sampler.sample`, and ``guide_interval``.
    """

    snapshot: Snapshot
    guide: Network | None = None
    guidance: float = 1.0
    seeds: Sequence[int]
    labels: np.ndarray
    conditions: "Conditions | None" = None
    solver: Mapping[str, Any] = field(default_factory=dict)

    @property
    def format(self) -> DataFormat:
        """What the samples are; 8-bit images where the snapshot does not say."""
        return self.snapshot.data or DataFormat()


@dataclass(frozen=True)
class Conditions:
    """The conditions of seeds, or their label vectors: seed s has those of sample s, modulo their number."""

    dataset: Dataset

    def __call__(self, seeds: Sequence[int], /) -> np.ndarray:
        """The conditions, float32 [n, channels, height, width]."""
        codec = self.dataset.format.condition or PIXELS
        return codec.encode(self.dataset.condition(self._indices(seeds)))

    def labels(self, seeds: Sequence[int], /) -> np.ndarray:
        """The label vectors, float32 [n, label_dim]."""
        return self.dataset.labels(self._indices(seeds))

    def _indices(self, seeds: Sequence[int]) -> np.ndarray:
        return np.array([seed % len(self.dataset) for seed in seeds], np.int64)


def run_sampling(
    options: SampleOptions, open_sampler: OpenSampler, *, prog: str, open_decoder: OpenDecoder | None = None
) -> None:
    """Sample with ``options``, write the images, and print the network, the guide and the paths.

    Raises:
        InputError: no such run, network, length, seed or class; an option out of range; or a failed write.
    """
    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, got {options.batch}: 64 is the default")
    network = find_network(options, train=f"{prog.removesuffix('sample')}train")
    snapshot = network.snapshot
    job = _job(options, network)
    decoder = _decoder(options, job.format.codec, open_decoder)
    kind = options.format or ("png" if decoder or job.format.codec.stored == "uint8" else "npz")
    channels = snapshot.required_config().img_channels
    if kind == "png" and decoder is None and job.format.codec.stored == "uint8" and channels not in (1, 3):
        raise InputError(f"PNG images must be grey or RGB, got {channels} channels: use --format npz")
    print(f"network  {network.origin}: {_describe(snapshot)}")
    if job.guidance != 1:
        print(f"guide    {options.guide or 'the same network without its label'}, weight {job.guidance:g}")
    if options.label is not None and job.format.classes and job.format.classes[job.labels[0]] != str(job.labels[0]):
        print(f"class    {job.labels[0]}, {job.format.classes[job.labels[0]]}")
    outdir = options.outdir or _default_folder(options, network.folder)
    if kind == "png":
        _claim(outdir, _settings(options, snapshot))
    finish = outputs.finish(kind, job.format, None if kind == "latents" else decoder)
    images = sample_images(job, open_sampler, batch=options.batch, shown=True, finish=finish)
    for path in outputs.write(kind, outdir, images, labels=job.labels, seeds=job.seeds):
        print(f"wrote    {path}")


def sample_images(
    job: Job, open_sampler: OpenSampler, *, batch: int, shown: bool = False, finish: outputs.Finish | None = None
) -> np.ndarray:
    """Samples [n, channels, height, width], one per seed of ``job``, in batches of ``batch``.

    ``finish`` makes an output of float32 samples of the network; None: pictures, uint8 with 1 or 3 channels.
    """
    config = job.snapshot.required_config()
    shape = (config.img_channels, *config.image_size)
    sampler = open_sampler(config, job.snapshot.params, guide=job.guide)
    made = []
    with Progress(total=len(job.seeds), shown=shown) as progress:
        for part in _parts(len(job.seeds), batch):
            seeds, labels = job.seeds[part], job.labels[part]
            rows = labels if labels.ndim == 2 else one_hot(labels, config.label_dim) if config.label_dim else None
            given: dict[str, Any] = {} if job.conditions is None else {"condition": job.conditions(seeds)}
            churn = (churn_noise(seeds, shape, step=step) for step in count())
            options = {**job.solver, **given, "guidance": job.guidance, "churn_noise": churn}
            samples = sampler(noise(seeds, shape), rows, **options)
            made.append(visible(samples, job.format) if finish is None else finish(samples))
            progress.advance(len(seeds))
            progress.report()
    return np.concatenate(made)


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


@dataclass(frozen=True)
class FoundNetwork:
    """A network, its origin in words, the folder for its samples, and the run it is of, if that is known."""

    snapshot: Snapshot
    origin: str
    folder: Path
    run: Run | None = None


def find_network(options: SampleOptions, *, train: str) -> FoundNetwork:
    """The network that ``options`` name: a snapshot, an average of a run, of the newest run, or the shipped one.

    Raises:
        InputError: no such run, network or length.
    """
    if options.net is not None:
        if options.run is not None or options.sigma_rel is not None:
            raise InputError("--net excludes --run and --sigma-rel, got one of them too: give --run instead of --net")
        return FoundNetwork(load_snapshot(options.net), str(options.net), Path("samples"))
    if options.sigma_rel is not None:
        Length.of(options.sigma_rel)
    if options.run is None and not any_run():
        if options.sigma_rel is not None:
            raise InputError(f"--sigma-rel needs a run to choose from, got none under runs/: train one with {train}")
        return FoundNetwork(load_snapshot(shipped.PATH), shipped.WHOSE, Path("samples"))
    run = Run(newest(train=train) if options.run is None else options.run)
    sources = run.snapshots(run.config().network)
    if not sources:
        raise InputError(
            f"a run must have snapshots, got none in {run.path}: continue it with {train} --outdir {run.path}"
        )
    snapshot, length, is_stored = average_of(sources, options.sigma_rel)
    origin = "stored" if is_stored else f"reconstructed from {len(sources)} snapshots"
    folder = run.samples_path / Path(snapshot_name(snapshot.nimg, length)).stem
    return FoundNetwork(snapshot, f"{run.path} ({origin})", folder, run)


# ---- the job


def job_of_run(snapshot: Snapshot, run: Run, *, seeds: Sequence[int], solver: Mapping[str, Any]) -> Job:
    """The samples of ``seeds`` by an average of a run, with the conditions and label vectors of its data.

    Raises:
        InputError: the data are not where the run had them.
    """
    given = _given(SampleOptions(), FoundNetwork(snapshot, "", run.samples_path, run))
    config = snapshot.required_config()
    vectors = given is not None and config.label_dim > 0 and given.dataset.vectors
    labels = given.labels(seeds) if given and vectors else labels_of_seeds(seeds, config.label_dim)
    conditions = given if config.cond_channels else None
    return Job(snapshot=snapshot, seeds=seeds, labels=labels, conditions=conditions, solver=solver)


def _job(options: SampleOptions, network: FoundNetwork) -> Job:
    snapshot, guidance = network.snapshot, options.guidance
    config = snapshot.required_config()
    if options.guide is not None and guidance == 1:
        raise InputError(f"--guide needs a guidance weight other than 1, got {options.guide} alone: add --guidance 2")
    guide = None if options.guide is None else _guide(options.guide, config)
    if guidance != 1 and guide is None and not config.label_dim:
        raise InputError("--guidance of a network without labels needs a guide, got none: name one with --guide")
    seeds = parse_seeds(options.seeds)
    given = _given(options, network)
    vectors = given is not None and config.label_dim > 0 and given.dataset.vectors
    labels = given.labels(seeds) if given and vectors else _labels(options.label, seeds, snapshot)
    check_labels(config, guide and guide[0], labels, guidance)
    return Job(
        snapshot=snapshot,
        guide=guide,
        guidance=guidance,
        seeds=seeds,
        labels=labels,
        conditions=given if config.cond_channels else None,
        solver=_solver(options),
    )


def _given(options: SampleOptions, network: FoundNetwork) -> Conditions | None:
    """The conditions and label vectors of the options or of the run; None for a network that takes neither."""
    config, run = network.snapshot.required_config(), None if network.run is None else network.run.config()
    vectors = run is not None and run.data_summary is not None and run.data_summary.vectors
    if not config.cond_channels and not (options.data or (vectors and config.label_dim)):
        return None
    data = options.data or (run.data if run is not None else None)
    condition = options.condition or (run.condition if run is not None else None)
    if config.cond_channels and condition is None:
        raise InputError("a network with conditions needs --condition, got none: name images or arrays")
    if config.cond_channels and not (options.data or vectors):
        data = condition  # only the conditions are needed
    dataset = open_dataset(
        str(data), condition=condition if config.cond_channels else None, format=network.snapshot.data
    )
    need = (config.cond_channels, *(config.image_size if config.cond_channels else dataset.shape[1:]))
    if (got := (dataset.cond_channels, *dataset.shape[1:])) != need:
        raise InputError(f"--condition must be of shape {need}, got {got} in {condition}: make it fit the network")
    if vectors and dataset.label_dim != config.label_dim:
        raise InputError(f"--data must have label vectors of {config.label_dim}, got {dataset.label_dim} in {data}")
    return Conditions(dataset)


def _guide(path: Path, config: NetworkConfig) -> Network:
    snapshot = stored_network(path)
    guide = snapshot.required_config()
    for name in ("img_resolution", "img_channels"):
        if (got := getattr(guide, name)) != (need := getattr(config, name)):
            raise InputError(f"--guide must make images of the same shape, got {name} {got} for {need}: choose another")
    for name, what in (("label_dim", "classes"), ("cond_channels", "condition")):
        if (got := getattr(guide, name)) not in (0, need := getattr(config, name)):
            raise InputError(f"--guide must have no {what} or {need}, got {got}: choose another")
    return guide, snapshot.params


def _labels(label: str | None, seeds: Sequence[int], snapshot: Snapshot) -> np.ndarray:
    label_dim = snapshot.required_config().label_dim
    if label is not None and not label_dim:
        raise InputError(f"--class needs a network with labels, got {label} for one without: leave it out")
    if label is None:
        return labels_of_seeds(seeds, label_dim)
    names = snapshot.data.classes if snapshot.data else ()
    number = names.index(label) if label in names else int(label) if label.isdecimal() else -1
    if not 0 <= number < label_dim:
        known = f" or a name such as {names[0]}" if names and names[0] != "0" else ""
        raise InputError(f"--class must be from 0 to {label_dim - 1}{known}, got {label}: choose one of these")
    return np.full(len(seeds), number, np.int64)


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
            name += f"-{word}{value if isinstance(value, str) else f'{value:g}'}"
    rest = {n: str(getattr(options, n)) for n in (*_SOLVER, "guide", "precision", "data", "condition", "vae")}
    if rest != {n: str(getattr(usual, n)) for n in rest}:
        name += f"-{crc32(json.dumps(rest).encode()):08x}"
    return folder.with_name(name)


def _settings(options: SampleOptions, snapshot: Snapshot) -> dict[str, Any]:
    """All that an image depends on, besides its seed."""
    network = 0
    for _, array in sorted(snapshot.params.items()):
        network = crc32(np.ascontiguousarray(array).tobytes(), network)
    names = ("label", "steps", *_SOLVER, "guidance", "guide", "precision", "data", "condition", "vae")
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


def _decoder(options: SampleOptions, codec: Codec, open_decoder: OpenDecoder | None) -> outputs.Decode | None:
    """What makes images of latents: the autoencoder of --vae, or the one that the snapshot names if it is at hand."""
    if codec.vae is None and options.vae is not None:
        raise InputError(f"--vae decodes latents, got {options.vae} for a network of {codec.stored} data: leave it out")
    if codec.vae is None or open_decoder is None or options.format == "latents":
        return None
    try:
        return open_decoder(options.vae or codec.vae, options.device, options.vae is None)
    except InputError as error:
        if options.vae is not None:
            raise
        print(f"note     samples stay latents: {error}")
        return None
