"""What may be typed after the train and sample commands, the same for every port?

Two dataclasses are the command lines. A field is None (a switch: False) unless it was given, so that
:mod:`.settings` can tell a wish from a default. What a text means is decided here; whether a value fits the preset,
the data or an earlier run is decided there.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isfinite, isnan
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from edm2_core.errors import InputError
from edm2_core.ladder import RUNGS

T = TypeVar("T")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def parse_count(text: str, /) -> int:
    """A number of images: '96', '192Ki', '1.5Mi'. Raises ValueError if it is none, or no whole number."""
    unit = _UNITS.get(text[-2:], 1)
    value = float(text[:-2] if unit > 1 else text) * unit
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def count_text(count: int, /) -> str:
    """The shortest way to write a number of images that :func:`parse_count` reads back: 196608 is '192Ki'."""
    unit = next((name for name, size in reversed(_UNITS.items()) if count and count % size == 0), "")
    return f"{count // _UNITS.get(unit, 1)}{unit}"


class _Wrong(NamedTuple):
    """Stands for a value until :func:`parse`, which knows the flag, can say what is wrong with it."""

    rule: str
    text: str


def spec(read: Callable[[str], Any], metavar: str, rule: str, *, many: bool = False, nargs: int = 1) -> Any:
    """How tyro reads a flag; the whole type, None included, so that its help shows neither {None} nor a union."""

    def convert(words: list[str]) -> Any:
        try:
            if not words:
                raise ValueError("no values")
            values = tuple(map(read, words))
        except (ValueError, OverflowError):  # the latter: a count of inf
            return _Wrong(rule, " ".join(words))
        return values if many or nargs > 1 else values[0]

    return PrimitiveConstructorSpec(
        nargs="*" if many else nargs,
        metavar=metavar,
        instance_from_str=convert,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _not_nan(text: str) -> float:
    if isnan(value := float(text)):
        raise ValueError(text)
    return value


def _switch(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def choice(*words: str) -> Any:
    return spec(lambda text: words[words.index(text)], f"{{{','.join(words)}}}", f"one of {', '.join(words)}")


quiet = tyro.conf.arg(help_behavior_hint="")  # the help text names the default; '(default: None)' would contradict it
_WHOLE = "a whole number"
_NUMBER = "a finite number"
_COUNT = "a whole number of images such as 96, 192Ki, 1.5Mi or 2Gi"
_count, _whole = spec(parse_count, "IMAGES", _COUNT), spec(int, "INT", _WHOLE)

Images = Annotated[int | None, _count, quiet]
Whole = Annotated[int | None, _whole, quiet]
Class = Annotated[int | None, _whole, tyro.conf.arg(name="class", help_behavior_hint="")]
Number = Annotated[float | None, spec(_finite, "FLOAT", _NUMBER), quiet]
Bound = Annotated[float | None, spec(_not_nan, "FLOAT", "a number or inf"), quiet]
Interval = Annotated[tuple[float, float] | None, spec(_not_nan, "LO HI", "two numbers", nargs=2), quiet]
Lengths = Annotated[
    tuple[float, ...] | None,
    spec(_finite, "FLOAT [FLOAT ...]", "one or more numbers, 0.05 0.10 say", many=True),
    quiet,
]
Pair = Annotated[tuple[float, float] | None, spec(_finite, "B1 B2", "two numbers within [0, 1)", nargs=2), quiet]
Rung = Annotated[str | None, choice(*RUNGS), quiet]
Switches = Annotated[
    tuple[tuple[str, Any], ...] | None,
    spec(_switch, "NAME=VALUE [...]", "names and values such as bias=true group_norm=none", many=True),
    quiet,
]
Precision = Annotated[str | None, choice("float32", "bfloat16", "float16"), quiet]
Format = Annotated[str | None, choice("png", "npz"), quiet]
Bytes = Annotated[int | None, spec(parse_count, "BYTES", "a whole number of bytes such as 512Mi or 1Gi"), quiet]
Text = Annotated[str | None, spec(str, "TEXT", "text"), quiet]
Location = Annotated[Path | None, spec(Path, "PATH", "a path"), quiet]
Given = Annotated[Path, spec(Path, "PATH", "a path"), tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the train command was asked for."""

    outdir: Location = None
    """Run folder; one that exists is resumed. Default: the next number under runs/."""
    data: Text = None
    """'digits', or a folder or zip of images. Default: digits."""
    preset: Text = None
    """Network and hyperparameters. Default: digits."""
    ladder: Rung = None
    """Rung of the paper's ladder, CONFIG A to G: the network, and how it is trained. Default: G."""
    switches: Switches = None
    """Switches of the ladder to set by themselves, bias=true group_norm=none say. Default: the rung's."""
    duration: Images = None
    """When to stop, in images since the start of the run: 96, 192Ki, 8Mi, 2Gi. Default: the preset's."""
    batch: Whole = None
    """Images per step, on all devices together. Default: the preset's."""
    batch_per_device: Whole = None
    """Images per device at a time; the rest of the batch follows in turns. Default: all of the device's share."""
    lr: Number = None
    """Reference learning rate. Default: the preset's."""
    decay: Number = None
    """Batches after which the learning rate falls with the square root of time; 0 is never. Default: the preset's."""
    rampup: Images = None
    """Images over which the learning rate rises. Default: the preset's."""
    betas: Pair = None
    """Adam's two rates of forgetting. Default: 0.9 0.99; 0.9 0.999 on CONFIG A."""
    dropout: Number = None
    """Share of activations dropped in training. Default: the preset's."""
    P_mean: Number = None
    """Mean of ln(sigma) in training. Default: the preset's."""
    P_std: Number = None
    """Standard deviation of ln(sigma) in training. Default: the preset's."""
    precision: Precision = None
    """Arithmetic of the network. Default: float32."""
    loss_scaling: Number = None
    """Factor on the loss while gradients are taken, for float16. Default: 1; 100 on CONFIG A to C."""
    sigma_rels: Lengths = None
    """Relative lengths of the averages to keep, each within (0, 0.2887). Default: 0.05 0.10."""
    half_life: Images = None
    """Half-life of a traditional average to keep instead of --sigma-rels. Default: none; on CONFIG A the rung's."""
    snapshot: Images = None
    """How often to store the averages. Default: the preset's."""
    snapshot_plan: Location = None
    """File of edm2 plan that says which averages to store when, for --sigma-rels and --snapshot. Default: none."""
    checkpoint: Images = None
    """How often to store the state to resume from. Default: a quarter of the duration, at most 128Mi."""
    status: Images = None
    """How often to log and to report. Default: a 48th of the duration, at most 128Ki."""
    telemetry: Whole = None
    """Steps between measurements of magnitudes, losses by noise level and updates; 0 is never. Default: 0."""
    seed: Whole = None
    """Seed of everything random. Default: 0."""
    device: Text = None
    """Where to train. Default: the fastest there is."""
    dry_run: bool = False
    """Print what would be done, and do nothing."""
    unconditional: bool = False
    """Train without labels."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What the sample command was asked for."""

    run: Location = None
    """Run folder to take the network from. Default: the newest under runs/."""
    net: Location = None
    """Snapshot to take the network from, instead of a run. Default: none."""
    sigma_rel: Number = None
    """Relative length of the average, reconstructed where it is not stored. Default: of those kept 0.10, else the
    longest; a traditional one where the run keeps that."""
    seeds: Text = None
    """One image for each, such as 0-63 or 3,7,10-19. Default: 0-63."""
    label: Class = None
    """Class of all images, from 0. Default: drawn by each seed."""
    steps: Whole = None
    """Sampling steps. Default: 32."""
    sigma_min: Number = None
    """Lowest noise level. Default: 0.002."""
    sigma_max: Number = None
    """Highest noise level. Default: 80."""
    rho: Number = None
    """Exponent of the noise levels. Default: 7."""
    S_churn: Number = None
    """Strength of noise added while sampling. Default: 0."""
    S_min: Number = None
    """Lowest noise level to churn at. Default: 0."""
    S_max: Bound = None
    """Highest noise level to churn at. Default: inf."""
    S_noise: Number = None
    """Scale of the noise added. Default: 1."""
    guidance: Number = None
    """Guidance weight. Default: 1, none."""
    guide: Location = None
    """Snapshot of the guiding network. Default: the same network without its label."""
    guide_interval: Interval = None
    """Noise levels to guide at. Default: all."""
    outdir: Location = None
    """Where the images go. Default: a folder under samples/ of the run; ./samples with --net."""
    format: Format = None
    """Image files and a grid, or one samples.npz. Default: png."""
    batch: Whole = None
    """Images at a time; does not change them. Default: 64."""
    precision: Precision = None
    """Arithmetic of the network. Default: float32."""
    device: Text = None
    """Where to sample. Default: the fastest there is."""


def flag(name: str, /) -> str:
    """How the field ``name`` is spelled on the command line."""
    return "--" + {"label": "class"}.get(name, name.replace("_", "-"))


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """The options in ``argv`` (None: those of this process). ``--help`` exits with 0, an unknown flag with 2.

    Raises:
        InputError: a value that cannot be read.
    """
    options = tyro.cli(cls, args=argv, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if isinstance(value, _Wrong):
            raise InputError(f"{flag(field.name)} must be {value.rule}, got {value.text!r}")
    return options
