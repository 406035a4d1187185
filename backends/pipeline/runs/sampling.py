"""The sample command of every port: loads the network, draws noise and labels from seeds, and writes the images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.remote import is_url, url_of
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.data.arrays import arrays_in
from backends.pipeline.data.labels import check_labels
from backends.ports import Network, OpenSampler, Params
from edm2_core.codec import Codec
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.network import NetworkConfig, parameter_count
from edm2_core.published import published
from edm2_core.sampler import noise_levels

from . import outputs
from .command_line import flag, parse_seeds
from .folder import Run
from .job import Job, batches, given_with, labels_of_seeds
from .networks import FoundNetwork, find_network, published_file, stored_network
from .options import SampleOptions, SamplingOptions
from .team import Team

_RECORD = "samples.json"
OpenDecoder = Callable[[str, str | None, bool], "outputs.Decode"]
"""(an autoencoder's name or folder, device, only if it is on this machine) -> latents to images."""
_SOLVER = ("sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "guide_interval")
_GIVEN = ("labels", "guide", "guide_sigma_rel", "precision", "data", "condition", "vae", "noise")
_DEPENDS = ("label", "steps", "guidance", *_SOLVER, *_GIVEN)
"""Options that an image depends on, besides its seed and the network."""


def run_sampling(
    options: SampleOptions,
    open_sampler: OpenSampler,
    *,
    prog: str,
    open_decoder: OpenDecoder | None = None,
    team: Team = Team(),
) -> None:
    """Sample with ``options``, write the images, and print the network, the guide and the paths. Of several processes
    each makes its share.

    Raises:
        InputError: no such run, network, length, seed or class; an option out of range; or a failed write.
    """
    if options.batch < 1:
        raise InputError(f"--batch must be at least 1, got {options.batch}: 64 is the default")
    say = team.say
    options = with_preset(options, say)
    network = network_of(options, train=f"{prog.removesuffix('sample')}train")
    snapshot = network.snapshot
    job = job_of(options, network)
    decoder = decoder_of(options, job.format.codec, open_decoder, kind=options.format)
    kind = options.format or ("png" if decoder or job.format.codec.stored == "uint8" else "npz")
    channels = snapshot.required_config().img_channels
    if kind == "png" and decoder is None and job.format.codec.stored == "uint8" and channels not in (1, 3):
        raise InputError(f"PNG images must be grey or RGB, got {channels} channels: use --format npz")
    say(f"network  {network.origin}: {_describe(snapshot)}")
    if job.guidance != 1:
        guide = "the same network without its label" if options.guide is None else url_of(options.guide)
        say(f"guide    {guide}, weight {job.guidance:g}")
    if options.label is not None and job.labels.size and (job.labels == job.labels[0]).all():
        say(f"class    {job.labels[0]}{_class_name(job)}")
    outdir = options.outdir or _default_folder(options, network.folder)
    if kind == "png" and team.rank == 0:
        _claim(outdir, settings(options, job))
    team.wait()
    finish = outputs.finish(kind, job.format, None if kind == "latents" else decoder)
    skip = partial(_all_there, outdir, options.subdirs) if kind == "png" and options.skip_existing else None
    writer = _writer(kind, outdir, job.seeds, options, team)
    made = batches(job, open_sampler, batch=options.batch, team=team, shown=True, finish=finish, skip=skip)
    for images in made:
        writer.add(outputs.Batch(images.images, job.seeds[images.part], job.labels[images.part]))
    team.wait()  # the grid is of all processes' pictures
    for path in writer.close():
        say(f"wrote    {path}")
    team.wait()


def _writer(
    kind: outputs.Kind, outdir: Path, seeds: Sequence[int], options: SampleOptions, team: Team
) -> outputs.Writer:
    if kind == "png":
        return outputs.PictureFiles(outdir, subdirs=options.subdirs, grid=seeds if team.rank == 0 else ())
    stem = "latents" if kind == "latents" else "samples"
    part = f"-{team.rank}-of-{team.world}" if team.world > 1 else ""
    return outputs.OneFile(outdir / f"{stem}{part}.{'npy' if kind == 'npy' else 'npz'}", kind)


def _all_there(outdir: Path, subdirs: bool, seeds: Sequence[int]) -> bool:
    return all(outputs.seed_path(outdir, seed, subdirs=subdirs).exists() for seed in seeds)


def _class_name(job: Job) -> str:
    names = job.format.classes
    known = bool(names) and names[job.labels[0]] != str(job.labels[0])
    return f", {names[job.labels[0]]}" if known else ""


# ---- the network


Chosen = TypeVar("Chosen", bound=SamplingOptions)


def with_preset(options: Chosen, say: Callable[[str], None], /) -> Chosen:
    """``options`` with the network, the guide and the weight of a published combination."""
    if options.preset is None:
        return options
    given = [name for name in ("net", "run", "guide") if getattr(options, name) is not None]
    if given or options.guidance != 1:
        raise InputError(f"--preset names network, guide and weight, got {flag((given or ['guidance'])[0])} too")
    combination = published(options.preset)
    net = published_file(combination.net, options.models)
    guide = None if combination.guide is None else published_file(combination.guide, options.models)
    say(f"preset   {options.preset}: published {combination.metric} {combination.score:g} of 50000 images")
    return replace(options, net=net, guide=guide, guidance=combination.guidance)


def network_of(options: SamplingOptions, /, *, train: str) -> FoundNetwork:
    """The network that ``options`` name; ``train`` is the command to suggest. Raises InputError: there is none."""
    if options.net is not None and options.run is not None:
        raise InputError("--net and --run name the same thing, got both: give one of them")
    if options.run is not None and not is_url(options.run) and not options.run.is_dir():
        Run(options.run).config()  # raises
    path = options.run if options.net is None else options.net
    return find_network(path, sigma_rel=options.sigma_rel, train=train)


# ---- the job


def job_of(options: SamplingOptions, network: FoundNetwork, /) -> Job:
    """The samples that ``options`` ask of a network.

    Raises:
        InputError: a seed, a class, a guide or a condition that does not fit; an option out of range.
    """
    snapshot, guidance = network.snapshot, options.guidance
    config = snapshot.required_config()
    if options.guide is not None and guidance == 1:
        raise InputError(f"--guide needs a guidance weight other than 1, got {options.guide} alone: add --guidance 2")
    if options.guide is None and options.guide_sigma_rel is not None:
        raise InputError(f"--guide-sigma-rel needs a --guide, got {options.guide_sigma_rel} alone: name a run")
    guide = None if options.guide is None else _guide(options.guide, options.guide_sigma_rel, config)
    if guidance != 1 and guide is None and not config.label_dim:
        raise InputError("--guidance of a network without labels needs a guide, got none: name one with --guide")
    seeds = parse_seeds(options.seeds)
    given = given_with(snapshot, network.run, data=options.data, condition=options.condition)
    vectors = given is not None and config.label_dim > 0 and given.dataset.vectors
    labels = given.labels(seeds) if given and vectors else _labels(options, seeds, snapshot)
    check_labels(config, guide and guide[0], labels, guidance)
    return Job(
        snapshot=snapshot,
        guide=guide,
        guidance=guidance,
        seeds=seeds,
        labels=labels,
        conditions=given if config.cond_channels else None,
        solver=_solver(options),
        noise=options.noise,
    )


def _guide(path: Path, sigma_rel: float | None, config: NetworkConfig) -> Network:
    snapshot = stored_network(path, sigma_rel=sigma_rel)
    guide = snapshot.required_config()
    for name in ("img_resolution", "img_channels"):
        if (got := getattr(guide, name)) != (need := getattr(config, name)):
            raise InputError(f"--guide must make images of the same shape, got {name} {got} for {need}: choose another")
    for name, what in (("label_dim", "classes"), ("cond_channels", "condition")):
        if (got := getattr(guide, name)) not in (0, need := getattr(config, name)):
            raise InputError(f"--guide must have no {what} or {need}, got {got}: choose another")
    return guide, snapshot.params


def _labels(options: SamplingOptions, seeds: Sequence[int], snapshot: Snapshot) -> np.ndarray:
    config, label = snapshot.required_config(), options.label
    if options.labels is not None:
        if label is not None:
            raise InputError("--class and --labels exclude each other, got both: give one of them")
        return _labels_in(options.labels, seeds, config.label_dim)
    if label is not None and not config.label_dim:
        raise InputError(f"--class needs a network with labels, got {label} for one without: leave it out")
    if label is None:
        return labels_of_seeds(seeds, config, options.noise)
    names = snapshot.data.classes if snapshot.data else ()
    classes = range(config.label_dim) if label == "all" else _classes(label, names, config.label_dim)
    return np.array([classes[i % len(classes)] for i in range(len(seeds))], np.int64)


def _classes(label: str, names: Sequence[str], label_dim: int) -> list[int]:
    """The class of a name or a number, or of several with commas between them."""
    numbers = []
    for word in [label] if label in names else label.split(","):
        number = names.index(word) if word in names else int(word) if word.isdecimal() else -1
        if not 0 <= number < label_dim:
            known = f" or a name such as {names[0]}" if names and names[0] != "0" else ""
            raise InputError(f"--class must be from 0 to {label_dim - 1}{known} or all, got {word}: choose of these")
        numbers.append(number)
    return numbers


def _labels_in(path: Path, seeds: Sequence[int], label_dim: int) -> np.ndarray:
    """Rows of a .npy of class ids [n] or of vectors [n, label_dim]: image i has row i, modulo their number."""
    arrays = arrays_in(path)
    values = np.asarray(arrays.get("labels", next(iter(arrays.values()))))
    whole, vectors = values.dtype.kind in "iu" and values.ndim == 1, values.ndim == 2 and values.shape[1] == label_dim
    if not len(values) or not (whole or vectors):
        raise InputError(
            f"--labels must be class ids [n] or vectors [n, {label_dim}], got {list(values.shape)} in {path}"
        )
    rows = values[np.arange(len(seeds)) % len(values)]
    if not whole:
        return np.asarray(rows, np.float32)
    if values.min() < 0 or values.max() >= label_dim:
        raise InputError(f"--labels must be from 0 to {label_dim - 1}, got {values.min()} to {values.max()} in {path}")
    return np.asarray(rows, np.int64)


def _solver(options: SamplingOptions) -> dict[str, Any]:
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
    rest = {n: str(getattr(options, n)) for n in _DEPENDS if n not in ("label", "guidance", "steps")}
    if rest != {n: str(getattr(usual, n)) for n in rest}:
        name += f"-{crc32(json.dumps(rest).encode()):08x}"
    return folder.with_name(name)


def settings(options: SamplingOptions, job: Job, /) -> dict[str, Any]:
    """All that an image depends on, besides its seed."""
    networks = {"network": _checksum(job.snapshot.params)}
    if job.guide is not None:
        networks["guide-network"] = _checksum(job.guide[1])
    return {**networks, **{flag(n)[2:]: str(getattr(options, n)) for n in _DEPENDS}}


def _checksum(params: Params) -> str:
    total = 0
    for _, array in sorted(params.items()):
        total = crc32(np.ascontiguousarray(array).tobytes(), total)
    return f"{total:08x}"


def _claim(outdir: Path, needed: dict[str, Any]) -> None:
    """Record ``needed`` in the folder, so that images of other settings are never mixed with these. Raises InputError
    where it has such images."""
    path = outdir / _RECORD
    if not path.exists():
        if old := next(outdir.glob("[0-9]*.png"), None):
            raise InputError(
                f"{outdir} must have no images of unknown settings, got {old.name}: choose another --outdir"
            )
        write_bytes(path, json.dumps(needed, indent=1).encode() + b"\n")
        return
    try:
        stored = dict(parse_json(path.read_text(encoding="utf-8")))
    except ValueError:
        stored = {}
    for name, value in needed.items():
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


def decoder_of(
    options: SamplingOptions, codec: Codec, open_decoder: OpenDecoder | None, /, *, kind: str | None = None
) -> outputs.Decode | None:
    """What makes images of latents: the autoencoder of --vae, or the one that the snapshot names if it is at hand."""
    if codec.vae is None and options.vae is not None:
        raise InputError(f"--vae decodes latents, got {options.vae} for a network of {codec.stored} data: leave it out")
    if codec.vae is None or open_decoder is None or kind == "latents":
        return None
    try:
        return open_decoder(options.vae or codec.vae, options.device, options.vae is None)
    except InputError as error:
        if options.vae is not None:
            raise
        print(f"note     samples stay latents: {error}")
        return None
