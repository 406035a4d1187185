"""Options of the train and sample commands of every port.

The train command parses its line twice: first the options that determine the defaults of others (run folder, preset,
rung), then all.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from backends.pipeline.checkpoints.checksums import KEY
from backends.pipeline.checkpoints.remote import is_url, url_of
from backends.pipeline.data.datasets import DIGITS, Kind, open_dataset
from backends.ports import Compile, Machine
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.ladder import Rung
from edm2_core.network import NetworkConfig
from edm2_core.presets import AUTO, CUSTOM, Hyperparameters, Preset, on_rung, preset, recipe

from .command_line import flag, flags_given, parse, parse_some, reader
from .config import Precision, TrainConfig
from .folder import Run
from .job import Noise
from .mirror import folder_of, working_copy
from .trackers import OPENED, check_installed

_EXCLUSIVE = (
    ("half_life", "sigma_rels"),
    ("half_life", "snapshot_plan"),
    ("snapshot_plan", "sigma_rels"),
    ("snapshot_plan", "snapshot"),
    ("snapshot_plan", "snapshot_dtype"),
)


def _switch(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(text)
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value


def _tracker(text: str) -> str:
    if text not in OPENED:
        raise ValueError(text)
    return text


Switches = Annotated[
    tuple[tuple[str, Any], ...],
    reader(_switch, "NAME=VALUE [...]", "one or more names with values such as bias=true group_norm=none", nargs="*"),
]
TrackerNames = Annotated[
    tuple[str, ...],
    reader(_tracker, "{" + ",".join(OPENED) + "} [...]", f"one or more of {', '.join(OPENED)}", nargs="*"),
]
Class = Annotated[str | None, tyro.conf.arg(name="class")]
ConfigFile = Annotated[Path | None, tyro.conf.arg(name="config")]


def _auto_or_number(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else float(text)


SigmaData = Annotated[
    float | Literal["auto"] | None, reader(_auto_or_number, "auto|FLOAT", "auto or a number", optional=True)
]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Sizes of the network in place of the preset's."""

    channels: int | None = None
    """Channels of the first level."""
    channel_mult: tuple[float, ...] | None = None
    """Channels of each level in units of --channels, such as 1 2 3 4; each level has half the resolution of the last.
    """
    blocks: int | None = None
    """Blocks of each level."""
    attention: tuple[int, ...] | None = None
    """Longer sides of the levels that attend, such as 16 8; 0 for none."""
    channels_per_head: int | None = None
    """Channels of an attention head."""
    sigma_data: SigmaData = None
    """Standard deviation of the data as the network sees them; auto measures it."""
    pad: bool = False
    """Surround images with zeros inside the network where their sides cannot be halved often enough."""

    def chosen(self) -> dict[str, Any]:
        """The fields of a NetworkConfig that are given."""
        given = {field: getattr(self, name) for name, field in NETWORK_FIELDS.items()}
        return {field: value for field, value in given.items() if value is not None and value is not False}


NETWORK_FIELDS = {
    "channels": "model_channels",
    "channel_mult": "channel_mult",
    "blocks": "num_blocks",
    "attention": "attn_resolutions",
    "channels_per_head": "channels_per_head",
    "sigma_data": "sigma_data",
    "pad": "pad",
}
"""By name of the option, the field of a NetworkConfig."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Metrics of the averages while a run trains."""

    evaluate: int | None = None
    """Images between evaluations of the tracked averages, such as 8Mi. Without it: none."""
    evaluate_metric: str = "fid"
    """The metric, as in edm2 evaluate, against the training data."""
    evaluate_images: int = 5000
    """Images that are sampled for each average."""
    evaluate_steps: int = 32
    """Sampling steps."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of the train command. Those in ``config`` are stored with the run; ``previous`` is the config of the run
    that is resumed, or None; ``url`` is that of the run whose working copy is ``outdir``, or None; ``words`` are the
    line that they were read from."""

    outdir: Path | None = None
    """Run folder, or the URL of one; an existing run is resumed. Without it: a new numbered folder under runs/."""
    data: str | None = None
    """'digits', or a folder, file or URL of images, arrays or latents. Without it: digits, or the resumed run's."""
    preset: str = AUTO
    """Network and hyperparameters; auto chooses them by the number and the size of the images."""
    config_file: ConfigFile = None
    """config.json of a run, or JSON of a NetworkConfig's fields: network and hyperparameters instead of a preset's."""
    ladder: Rung = "G"
    """Rung of the paper's ladder, CONFIG A to G: the network and its training."""
    network: Annotated[NetworkOptions, tyro.conf.arg(name="")] = NetworkOptions()
    switches: Switches = ()
    """Switches of the ladder to change, such as bias=true group_norm=none."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    label_dropout: float = 0.0
    """Probability of dropping the label of an image in training, so that the network can guide itself; 0.1 is usual."""
    unconditional: bool = False
    """Train without labels."""
    snapshot_plan: Path | None = None
    """File written by edm2 plan: which averages to store when, instead of --sigma-rels and --snapshot."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    previous: tyro.conf.Fixed[TrainConfig | None] = None
    url: tyro.conf.Fixed[str | None] = None
    words: tyro.conf.Fixed[tuple[str, ...]] = ()
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()
    scores: Annotated[ScoreOptions, tyro.conf.arg(name="")] = ScoreOptions()
    log: TrackerNames = ()
    """Experiment trackers that are sent the log, telemetry, figures and pictures; it may change when a run is
    resumed."""
    no_picture: bool = False
    """Draw no averages of several lengths at the end."""
    dry_run: bool = False
    """Print the config and stop before training."""


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The options that determine the defaults of the others."""

    outdir: Path | None = None
    data: str | None = None
    data_format: Kind | None = None
    preset: str = AUTO
    config_file: ConfigFile = None
    ladder: Rung = "G"


def parse_train(
    argv: Sequence[str] | None = None, *, prog: str, description: str, previous: TrainConfig | None = None
) -> TrainOptions:
    """The options of the train command. Defaults come from the resumed run, else from the preset on its rung.

    ``previous`` is the config of the resumed run; None: that in the folder --outdir, if there is one.

    Raises:
        InputError: as :func:`parse`; an unknown preset; a damaged run; options that exclude each other; or a tracker
            that is not installed.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    words = [re.sub("^--batch-gpu(?=$|=)", "--batch-per-device", word) for word in given]  # the official spelling
    default = _defaults(words, prog=prog) if previous is None else _resuming(previous)
    options = parse(TrainOptions, words, prog=prog, description=description, default=default, writes_to_urls=True)
    _check_exclusive(flags_given(words))
    check_installed(options.log)
    config = options.config
    config = replace(config, condition=_absolute(config.condition), init=_absolute(config.init))
    url = url_of(options.outdir) if options.outdir is not None and is_url(options.outdir) else None
    outdir = options.outdir if url is None else folder_of(url)
    return replace(options, outdir=outdir, preset=_plain(options.preset), config=config, words=tuple(given), url=url)


def with_precision(options: TrainOptions, argv: Sequence[str] | None, fastest: Precision, /) -> TrainOptions:
    """``options`` with the ``fastest`` precision of the device, where a fresh run's line names none."""
    words = sys.argv[1:] if argv is None else argv
    if options.previous is not None or "precision" in flags_given(words):
        return options
    return replace(options, config=replace(options.config, precision=fastest))


def _absolute(path: str | None) -> str | None:
    """As the config records it, wherever the command runs."""
    return path if path is None or is_url(path) else str(Path(path).absolute())


def _plain(name: str) -> str:
    """The name of a preset, which the official tools spell edm2-img512-xs."""
    return name.removeprefix("edm2-")


def _check_exclusive(names: set[str]) -> None:
    for one, other in _EXCLUSIVE:
        if {one, other} <= names:
            raise InputError(f"{flag(one)} and {flag(other)} exclude each other, got both: give one of them")


def _defaults(words: Sequence[str], *, prog: str) -> TrainOptions:
    choice = parse_some(_Choice, [word for word in words if word not in ("-h", "--help")], prog=prog)
    outdir = choice.outdir
    if outdir is not None and is_url(outdir):
        outdir = working_copy(url_of(outdir))
    if outdir is not None and (run := Run(outdir)).exists():
        return _resuming(run.config())
    name, base = _base(choice)
    base = on_rung(base, choice.ladder)
    hyper = base.hyper
    if "sigma_rels" in flags_given(words):
        hyper = replace(hyper, half_life=None)  # the half-life of CONFIG A is only a default
    config = TrainConfig(preset=name, network=base.network, hyper=hyper)
    network = base.network
    return TrainOptions(
        preset=choice.preset,
        ladder=choice.ladder,
        dropout=network.dropout,
        label_dropout=network.label_dropout,
        config=config,
    )


def _resuming(config: TrainConfig) -> TrainOptions:
    return TrainOptions(
        preset=config.preset,
        ladder=config.network.ladder,
        dropout=config.network.dropout,
        label_dropout=config.network.label_dropout,
        config=config,
        previous=config,
    )


def _base(choice: _Choice) -> tuple[str, Preset]:
    """The preset that is named, in a file, or chosen by the data; and its name, as the config records it."""
    if choice.config_file is not None:
        if choice.preset != AUTO:
            raise InputError(f"--config and --preset exclude each other, got {choice.preset} too: give one of them")
        return CUSTOM, preset_in(choice.config_file)
    if choice.preset != AUTO:
        name = _plain(choice.preset)
        return name, preset(name)
    if choice.data in (None, DIGITS):
        return DIGITS, preset(DIGITS)
    dataset = open_dataset(str(choice.data), kind=choice.data_format, format=DataFormat())  # nothing is measured yet
    return AUTO, recipe(len(dataset), dataset.shape, labels=dataset.label_dim > 0)


def preset_in(path: Path, /) -> Preset:
    """The network and hyperparameters in a config.json, or in JSON of a network's fields. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8")
        values = parse_json(text)
        if isinstance(values, dict) and "network" in values:
            edited = {key: value for key, value in values.items() if key != KEY}  # it may have been changed by hand
            config = TrainConfig.from_json(json.dumps(edited), name=str(path))
            return Preset(network=config.network, hyper=config.hyper, any_data=True)
        given: dict[str, Any] = {"img_resolution": 1, "img_channels": 1, "pad": True, **values}
        network = NetworkConfig(**given)
        return Preset(network=network, hyper=Hyperparameters(), any_data=True)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        why = " ".join(str(error).split())
        raise InputError(f"--config must be a config.json or fields of a network, got '{why}' in {path}") from error


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Which samples, of which network."""

    run: Path | None = None
    """Run folder with the network. Without it: the newest under runs/; without any, the network that ships with edm2.
    """
    net: Path | None = None
    """The network: a snapshot, an official pickle, a run, or a folder of snapshots or pickles. The same as --run, which
    torchrun takes for an option of its own."""
    preset: str | None = None
    """Network, guide and guidance weight of a published score, such as edm2-img512-s-guid-fid."""
    models: str | None = None
    """Folder of published networks, hf://user/name, or the address to download them from. Without it: ~/.cache/edm2,
    and the authors'."""
    sigma_rel: float | None = None
    """Relative length of the average, reconstructed if it is not stored. Without it: the stored average of length
    0.10, else the longest; for a run with --half-life the traditional average."""
    seeds: str = "0-63"
    """Seeds, one image for each, such as 0-63 or 3,7,10-19."""
    label: Class = None
    """Class of all images, a number from 0 or a name; several with commas, or all, in turn. Without it: drawn from each
    seed."""
    labels: Path | None = None
    """.npy of class ids or label vectors, a row for each image in turn."""
    noise: Noise = "edm2"
    """How noise and label are drawn from a seed; torch: as the official tools draw them on a CPU."""
    data: str | None = None
    """Data whose label vectors are used: seed s takes those of sample s. Without it: the run's own."""
    condition: str | None = None
    """Conditions of the images: seed s takes that of sample s, modulo their number. Without it: the run's own."""
    steps: int = 32
    """Sampling steps."""
    sigma_min: float = 0.002
    """Lowest noise level."""
    sigma_max: float = 80.0
    """Highest noise level."""
    rho: float = 7.0
    """Exponent of the noise levels."""
    S_churn: float = 0.0
    """Amount of noise added while sampling; 0 samples deterministically."""
    S_min: float = 0.0
    """Lowest noise level at which noise is added."""
    S_max: float = inf
    """Highest noise level at which noise is added."""
    S_noise: float = 1.0
    """Standard deviation of the added noise."""
    guidance: float = 1.0
    """Guidance weight; 1 disables guidance."""
    guide: Path | None = None
    """The guiding network, as in --net. Without it: the same network without its label, if it was trained with
    --label-dropout."""
    guide_sigma_rel: float | None = None
    """Relative length of the guide's average, where --guide is a run or a folder."""
    guide_interval: tuple[float, float] = (0.0, inf)
    """Lowest and highest noise level at which guidance acts."""
    vae: str | None = None
    """Autoencoder that decodes latents: a folder, or an ID of the hub. Without it: the one that the data name, if it is
    on this machine."""
    batch: int = 64
    """Images per call of the network; has no effect on the result."""
    precision: Precision = "float32"
    """Dtype of the network's activations."""
    compile: Compile = "auto"
    """Of PyTorch's network: auto launches its kernels at once on GPUs, by CUDA graphs; max compiles it first, which
    takes a minute or more; blocks compiles each kind of block once, which takes less; off. JAX and MLX always
    compile."""
    device: str | None = None
    """Device to sample on. Without it: the fastest available."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingOptions):
    """Options of the sample command."""

    outdir: Path | None = None
    """Folder of the images. Without it: a folder under samples/ of the run; ./samples with --net."""
    format: Literal["png", "npz", "npy", "latents"] | None = None
    """png: an image file per seed, and a grid; npz, npy: one file, float32 unless the data are 8-bit; latents: an npz
    of latents that are not decoded. Without it: png for images, npz for other data."""
    skip_existing: bool = False
    """Make only pictures that are not there yet, to go on after an interruption."""
    subdirs: bool = False
    """A folder for each thousand seeds."""
