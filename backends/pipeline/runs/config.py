"""What exactly is trained, and how? Everything that config.json needs to repeat a run, resolved once.

A value comes from the command line; failing that, from the run that is resumed; failing that, from the preset.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from backends.pipeline.data.datasets import Dataset
from edm2_core import __version__
from edm2_core.ema import HalfLife, SnapshotPlan, TimedPlan, as_length, plan_from_json
from edm2_core.errors import InputError
from edm2_core.ladder import Rung, Switches
from edm2_core.network import NetworkConfig
from edm2_core.presets import Ki, Mi, Preset, on_rung, preset

from .options import TrainOptions, flag

FORMAT = 1
_FREE = (
    "duration",
    "status",
    "checkpoint",
    "telemetry",
)  # what a resumed run may change; where it runs is no setting at all
_TRAINING = ("duration", "batch", "lr", "decay", "rampup", "P_mean", "P_std", "snapshot", "betas", "loss_scaling",
             "half_life")  # what a preset knows of it  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What a dataset must still be when a run on it is resumed."""

    count: int
    resolution: int
    channels: int
    label_dim: int

    @classmethod
    def of(cls, dataset: Dataset) -> "DataSummary":
        return cls(
            count=len(dataset),
            resolution=dataset.resolution,
            channels=dataset.channels,
            label_dim=dataset.label_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run, but for where it is kept and on what it is computed. ``decay`` is in batches, other lengths in images.

    With a ``half_life`` it keeps that traditional average, and there are no ``sigma_rels``.

    Raises:
        InputError: a value is out of range, averages of both kinds, or two stored ones would get the same file name.
    """

    preset: str
    network: NetworkConfig
    data: str
    data_summary: DataSummary
    duration: int
    batch: int
    lr: float
    decay: float
    rampup: int
    P_mean: float
    P_std: float
    snapshot: int
    checkpoint: int
    status: int
    precision: str = "float32"
    betas: tuple[float, float] = (0.9, 0.99)
    loss_scaling: float = 1.0
    sigma_rels: tuple[float, ...] = (0.05, 0.10)
    half_life: int | None = None
    snapshot_plan: dict[str, Any] | None = None
    telemetry: int = 0
    seed: int = 0
    edm2: str = __version__

    def __post_init__(self) -> None:
        for name in ("sigma_rels", "betas"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def lengths(self) -> tuple[float, ...]:
        """What is averaged: relative lengths, or one half-life."""
        return self.sigma_rels if self.half_life is None else (HalfLife(self.half_life),)

    @property
    def plan(self) -> SnapshotPlan | None:
        """Which averages to store when; None: all of them every ``snapshot`` images."""
        if self.snapshot_plan is None:
            return None
        return plan_from_json(json.dumps(self.snapshot_plan), name="--snapshot-plan")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str) -> "Settings":
        """What :meth:`to_json` wrote; ``name`` is the file's, for errors.

        Raises:
            InputError: no JSON, a newer format, or fields missing or unknown.
        """
        try:
            values = dict(json.loads(text))
            version = values.pop("format")
            if version > FORMAT:
                raise InputError(f"{name} must have format {FORMAT} or less, got {version}: install a newer edm2")
            values["network"] = NetworkConfig(**values["network"])
            values["data_summary"] = DataSummary(**values["data_summary"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            why = str(error).splitlines()[0]
            raise InputError(
                f"{name} must be settings of a run as they were written, got {why}: restore the file"
            ) from error


def _check(settings: Settings) -> None:
    at_least = {
        "duration": 1,
        "batch": 1,
        "snapshot": 1000,
        "checkpoint": 1,
        "status": 1,
        "rampup": 0,
        "decay": 0,
        "half_life": 1,
        "telemetry": 0,
        "seed": 0,
    }
    for name, least in at_least.items():
        if (value := getattr(settings, name)) is not None and value < least:
            why = ": files are named by thousands of images" if least == 1000 else ""
            raise InputError(f"{flag(name)} must be at least {least}, got {value}{why}")
    for name in ("lr", "P_std", "loss_scaling"):
        if (value := getattr(settings, name)) <= 0:
            raise InputError(f"{flag(name)} must be positive, got {value}")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise InputError(f"--betas must be within [0, 1), got {_text(settings.betas)}: 0.9 0.99 is the paper's")
    for length in settings.lengths:
        as_length(length)
    if settings.half_life is not None and settings.sigma_rels:
        raise InputError(
            f"--half-life must be left out where --sigma-rels or --snapshot-plan say what to average, got "
            f"{settings.half_life} and {_text(settings.sigma_rels)}: give one of them"
        )
    for one, other in combinations(settings.sigma_rels, 2):
        if f"{one:.3f}" == f"{other:.3f}":
            raise InputError(f"--sigma-rels must differ in their first three digits, got {one} and {other}: drop one")
    if isinstance(plan := settings.plan, TimedPlan) and plan.duration != settings.duration:
        raise InputError(
            f"--duration must be that of the --snapshot-plan, {plan.duration} images, got {settings.duration}: "
            "make a plan for this duration, or one for any time"
        )


def data_spec(options: TrainOptions, previous: Settings | None = None) -> str:
    """Which data to open: 'digits', or the absolute path of a folder or archive.

    Raises:
        InputError: no data given with a preset that is not made for digits.
    """
    if options.data is not None:
        return options.data if options.data == "digits" else str(Path(options.data).absolute())
    if previous is not None:
        return previous.data
    if options.preset not in (None, "digits"):
        preset(options.preset)  # an unknown one is the first thing to say
        raise InputError(f"--data must be given with --preset {options.preset}: a folder or zip of images")
    return "digits"


def resolve(options: TrainOptions, dataset: Dataset, previous: Settings | None = None) -> Settings:
    """The settings of a run on ``dataset``, which is what :func:`data_spec` names; ``previous`` are those it resumes.

    Raises:
        InputError: unknown preset; no labels for a conditional one; a value out of range; a batch that does not divide;
            or, when resuming, an option or data other than the run's.
    """
    if previous is None:
        settings = _fresh(options, dataset)
    else:
        _check_unchanged(options, dataset, previous)
        settings = replace(previous, **_given(options, _FREE))
    microbatches(settings.batch, options.batch_per_device, world=1)
    return settings


def microbatches(batch: int, per_device: int | None, *, world: int) -> int:
    """In how many turns each of ``world`` devices goes through its share of a batch, ``per_device`` images at a time.

    Raises:
        InputError: that does not come out even.
    """
    if batch % world:
        raise InputError(f"--batch must be divisible by the number of devices, got {batch} for {world}: change --batch")
    share = batch // world
    if per_device is None:
        return 1
    if per_device < 1 or share % per_device:
        raise InputError(
            f"--batch must be divisible by --batch-per-device times devices, got {batch} and {per_device} x {world}: "
            f"choose a --batch-per-device that divides {share}"
        )
    return share // per_device


def _given(options: TrainOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _fresh(options: TrainOptions, dataset: Dataset) -> Settings:
    name = options.preset or "digits"
    base = on_rung(preset(name), cast(Rung, options.ladder or "G"))
    values = {key: getattr(base, key) for key in _TRAINING}
    names = tuple(
        f.name
        for f in fields(Settings)
        if hasattr(options, f.name) and f.name not in ("data", "preset", "snapshot_plan")
    )
    values |= _given(options, names)
    if options.snapshot_plan is not None:
        values |= _planned(options)
    if options.half_life is None and "sigma_rels" in values:
        values["half_life"] = None  # the rung's own is only a default
    if values["half_life"] is not None:
        values.setdefault("sigma_rels", ())
    values.setdefault("checkpoint", max(1, min(values["duration"] // 4, 128 * Mi)))
    values.setdefault("status", max(1, min(values["duration"] // 48, 128 * Ki)))
    return Settings(
        preset=name,
        network=_network(options, name, base, dataset),
        data=data_spec(options),
        data_summary=DataSummary.of(dataset),
        **values,
    )


def _planned(options: TrainOptions) -> dict[str, Any]:
    """What a plan decides. Raises InputError: no such file, no plan, or something else that decides it too."""
    for name in ("sigma_rels", "snapshot"):
        if (other := getattr(options, name)) is not None:
            raise InputError(f"{flag(name)} must be left to --snapshot-plan, got {_text(other)} too: give one of them")
    path = Path(str(options.snapshot_plan))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--snapshot-plan must be a file of edm2 plan, got {path}, which cannot be read") from error
    plan = plan_from_json(text, name=str(path))
    return {"sigma_rels": plan.sigma_rels, "snapshot_plan": json.loads(plan.to_json())}


def _network(options: TrainOptions, name: str, base: Preset, dataset: Dataset) -> NetworkConfig:
    conditional = base.network.label_dim > 0 and not options.unconditional
    if conditional and not dataset.label_dim:
        raise InputError(
            f"preset {name} must have data with labels, got none in {dataset.name}: "
            "add a dataset.json with labels, or give --unconditional"
        )
    return replace(
        base.network,
        **_switches(options),
        img_resolution=dataset.resolution,
        img_channels=dataset.channels,
        label_dim=dataset.label_dim if conditional else 0,
        dropout=base.network.dropout if options.dropout is None else options.dropout,
    )


def _switches(options: TrainOptions) -> dict[str, Any]:
    """Raises InputError: no switch of that name."""
    own = dict(options.switches or ())
    names = [field.name for field in fields(Switches)]
    if unknown := sorted(set(own) - set(names)):
        raise InputError(f"--switches must be of {', '.join(names)}, got {unknown[0]}")
    return own


def _check_unchanged(options: TrainOptions, dataset: Dataset, previous: Settings) -> None:
    for name, was, wanted in _wishes(options, previous):
        if wanted != was:
            raise InputError(
                f"{name} must stay {_text(was)} when a run is resumed, got {_text(wanted)}: "
                "leave it out, or choose another --outdir"
            )
    now = DataSummary.of(dataset)
    for name, was in asdict(previous.data_summary).items():
        if (is_now := getattr(now, name)) != was:
            raise InputError(
                f"data must be those the run began with, got {name} {is_now} instead of {was} in {previous.data}: "
                "restore them, or choose another --outdir"
            )


def _wishes(options: TrainOptions, previous: Settings) -> Iterator[tuple[str, Any, Any]]:
    """(flag, the run's value, the wish) of everything given that a resumed run may not change."""
    for f in fields(Settings):
        if f.name not in (*_FREE, "data", "snapshot_plan") and (wish := getattr(options, f.name, None)) is not None:
            yield flag(f.name), getattr(previous, f.name), wish
    if options.data is not None:
        yield "--data", previous.data, data_spec(options)
    if options.snapshot_plan is not None:
        yield "--snapshot-plan", previous.snapshot_plan, _planned(options)["snapshot_plan"]
    if options.dropout is not None:
        yield "--dropout", previous.network.dropout, options.dropout
    if options.ladder is not None:
        yield "--ladder", previous.network.ladder, options.ladder
    for name, wish in _switches(options).items():
        yield f"--switches {name}", getattr(previous.network.switches, name), wish
    if options.unconditional:
        yield "--unconditional", previous.network.label_dim == 0, True


def _text(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
