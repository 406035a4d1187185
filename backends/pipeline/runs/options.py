"""Options of the train and sample commands of every port.

The train command parses its line twice: first the options that determine the defaults of others (run folder, preset,
rung), then all.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from backends.ports import Machine
from edm2_core.errors import InputError
from edm2_core.ladder import Rung
from edm2_core.presets import on_rung, preset

from .command_line import flag, flags_given, parse, parse_some, reader
from .config import Precision, TrainConfig
from .folder import Run

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
        return name, json.loads(value)
    except ValueError:
        return name, value


Switches = Annotated[
    tuple[tuple[str, Any], ...],
    reader(_switch, "NAME=VALUE [...]", "one or more names with values such as bias=true group_norm=none", nargs="*"),
]
Class = Annotated[int | None, tyro.conf.arg(name="class")]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of the train command. Those in ``config`` are stored with the run; ``previous`` is the config of the run
    that is resumed, or None."""

    outdir: Path | None = None
    """Run folder; an existing run is resumed. Without it: a new numbered folder under runs/."""
    data: str | None = None
    """'digits', or a folder or zip of images. Without it: digits, or the data of the resumed run."""
    preset: str = "digits"
    """Network and hyperparameters."""
    ladder: Rung = "G"
    """Rung of the paper's ladder, CONFIG A to G: the network and its training."""
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
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()
    no_picture: bool = False
    """Draw no averages of several lengths at the end."""
    dry_run: bool = False
    """Print the config and stop before training."""


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The options that determine the defaults of the others."""

    outdir: Path | None = None
    preset: str = "digits"
    ladder: Rung = "G"


def parse_train(argv: Sequence[str] | None = None, *, prog: str, description: str) -> TrainOptions:
    """The options of the train command. Defaults come from the resumed run, else from the preset on its rung.

    Raises:
        InputError: as :func:`parse`; an unknown preset; a damaged run; or options that exclude each other.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    default = _defaults(words, prog=prog)
    options = parse(TrainOptions, words, prog=prog, description=description, default=default)
    _check_exclusive(flags_given(words))
    return options


def _check_exclusive(names: set[str]) -> None:
    for one, other in _EXCLUSIVE:
        if {one, other} <= names:
            raise InputError(f"{flag(one)} and {flag(other)} exclude each other, got both: give one of them")


def _defaults(words: Sequence[str], *, prog: str) -> TrainOptions:
    choice = parse_some(_Choice, [word for word in words if word not in ("-h", "--help")], prog=prog)
    if choice.outdir is not None and (run := Run(choice.outdir)).exists():
        config = run.config()
        return TrainOptions(
            preset=config.preset,
            ladder=config.network.ladder,
            dropout=config.network.dropout,
            label_dropout=config.network.label_dropout,
            config=config,
            previous=config,
        )
    base = on_rung(preset(choice.preset), choice.ladder)
    hyper = base.hyper
    if "sigma_rels" in flags_given(words):
        hyper = replace(hyper, half_life=None)  # the half-life of CONFIG A is only a default
    config = TrainConfig(preset=choice.preset, network=base.network, hyper=hyper)
    return TrainOptions(preset=choice.preset, ladder=choice.ladder, dropout=base.network.dropout, config=config)


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of the sample command."""

    run: Path | None = None
    """Run folder with the network. Without it: the newest under runs/."""
    net: Path | None = None
    """Snapshot file with the network, instead of a run."""
    sigma_rel: float | None = None
    """Relative length of the average, reconstructed if it is not stored. Without it: the stored average of length
    0.10, else the longest; for a run with --half-life the traditional average."""
    seeds: str = "0-63"
    """Seeds, one image for each, such as 0-63 or 3,7,10-19."""
    label: Class = None
    """Class of all images, from 0. Without it: drawn from each seed."""
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
    """Snapshot or run of the guiding network. Without it: the same network without its label, if it was trained with
    --label-dropout."""
    guide_interval: tuple[float, float] = (0.0, inf)
    """Lowest and highest noise level at which guidance acts."""
    outdir: Path | None = None
    """Folder of the images. Without it: a folder under samples/ of the run; ./samples with --net."""
    format: Literal["png", "npz"] = "png"
    """png: an image file per seed, and a grid; npz: one samples.npz."""
    batch: int = 64
    """Images per call of the network; has no effect on the result."""
    precision: Precision = "float32"
    """Dtype of the network's activations."""
    device: str | None = None
    """Device to sample on. Without it: the fastest available."""
