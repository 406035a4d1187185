"""The config of a run: everything needed to repeat it, its checks, and its form in config.json.

Defaults stand on the fields of :class:`TrainConfig` and of :class:`~edm2_core.presets.Hyperparameters`; a preset
overrides them, the command line overrides the preset (:mod:`.options`, :mod:`.resolve`).
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from backends.pipeline.checkpoints.checksums import KEY, digest
from backends.pipeline.data.datasets import Dataset, Kind
from edm2_core import __version__
from edm2_core.codec import DataFormat
from edm2_core.ema import SnapshotPlan, StorageDtype, TimedPlan, plan_from_json
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.network import NetworkConfig, plan
from edm2_core.presets import Hyperparameters, Ki, Mi

FORMAT = 1
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Properties of a dataset that must be unchanged when a run on it is resumed."""

    count: int
    shape: tuple[int, int, int]
    label_dim: int
    vectors: bool = False
    cond_channels: int = 0
    format: DataFormat = DataFormat()

    @classmethod
    def of(cls, dataset: Dataset) -> "DataSummary":
        return cls(count=len(dataset), **{n: getattr(dataset, n) for n in _OF_DATASET})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DataSummary":
        read = values | {"shape": tuple(values["shape"]), "format": DataFormat.from_json(values["format"])}
        check_types(cls, read, name="data_summary")
        return cls(**read)


_OF_DATASET = ("shape", "label_dim", "vectors", "cond_channels", "format")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the result of a run; its folder and its machine are not part of it.

    Raises:
        InputError: a value is out of range, or the snapshot plan is for another duration or other averages.
    """

    preset: tyro.conf.Fixed[str] = "digits"
    network: tyro.conf.Fixed[NetworkConfig]
    data: tyro.conf.Fixed[str] = "digits"
    data_summary: tyro.conf.Fixed[DataSummary | None] = None
    data_format: Kind | None = None
    """What the data are. Without it: recognised by what is in them."""
    condition: str | None = None
    """Data of which each sample is the image-shaped condition of one of --data, in the same order."""
    init: str | None = None
    """Snapshot or run to start from; its clock begins anew. Arrays of other shapes are fresh."""
    train: tuple[str, ...] = ()
    """Patterns of the weights that are trained, such as 'unet.dec.*'; the others stay. Without it: all."""
    flip: bool = False
    """Mirror half of the images from left to right, each time anew."""
    holdout: float = 0.0
    """Share of the data that is not trained on, such as 0.05: the loss on it is logged."""
    skip_broken: bool = False
    """Let the next sample take the place of one that cannot be read, which is said once, instead of stopping."""
    hyper: Annotated[Hyperparameters, tyro.conf.arg(name="")] = Hyperparameters()
    snapshot_plan: tyro.conf.Fixed[SnapshotPlan | None] = None
    checkpoint: int | None = None
    """Images between saves of the state to resume from. Without it: a quarter of the duration, at most 128Mi. It is
    also saved with a line of the log, ten minutes after it was last."""
    keep: int = 1
    """Number of states that are kept, the last ones."""
    status: int | None = None
    """Images between lines of the log. Without it: a 48th of the duration, at most 128Ki."""
    telemetry: int = 50
    """Steps between measurements of magnitudes, losses by noise level and updates; 0 disables them."""
    snapshot_dtype: StorageDtype = "float16"
    """Dtype of the averages in snapshots; tensors that it cannot hold are stored in float32."""
    precision: Precision = "float32"
    """Dtype of the network's activations. The train command takes bfloat16 on GPUs and TPUs with hardware for it."""
    seed: int = 0
    """Seed of all random numbers."""
    edm2: tyro.conf.Fixed[str] = __version__

    def __post_init__(self) -> None:
        _check(self)

    @property
    def format(self) -> DataFormat:
        """Codec, condition and classes of the data; 8-bit images where nothing is known of them."""
        return DataFormat() if self.data_summary is None else self.data_summary.format

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the weights that stay as they are, but for forced normalization."""
        names = [name for name, parameter in plan(self.network).parameters.items() if parameter.trained]
        return frozenset(name for name in names if self.train and not any(fnmatchcase(name, p) for p in self.train))

    def intervals_filled(self) -> "TrainConfig":
        """This config with defaults of ``checkpoint`` and ``status``, which depend on the duration, filled in."""
        duration = self.hyper.duration
        return replace(
            self,
            checkpoint=self.checkpoint or max(1, min(duration // 4, 128 * Mi)),
            status=self.status or max(1, min(duration // 48, 128 * Ki)),
        )

    def to_json(self) -> str:
        """The text of config.json: one object, flat except for network, data summary and plan, with a checksum."""
        values = asdict(self) | {"network": self.network.to_json()}
        values |= values.pop("hyper")
        values["sigma_rels"] = () if self.hyper.half_life is not None else values["sigma_rels"]
        values["snapshot_plan"] = self.snapshot_plan and json.loads(self.snapshot_plan.to_json())
        values = {"format": FORMAT, **values}
        return json.dumps({**values, KEY: _sum(values)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str) -> "TrainConfig":
        """Read the text that :meth:`to_json` wrote; ``name`` is the file, for errors.

        Raises:
            InputError: invalid JSON, a newer format, missing or unknown fields, or values that were not written so.
        """
        try:
            values = dict(parse_json(text))
            written, now = values.pop(KEY, None), _sum(values)
            version = values.pop("format")
            if version > FORMAT:
                raise InputError(f"{name} must have format {FORMAT} or less, got {version}: install a newer edm2")
            values["network"] = NetworkConfig(**values["network"])
            if values.get("data_summary") is not None:
                values["data_summary"] = DataSummary.from_json(values["data_summary"])
            if values.get("snapshot_plan") is not None:
                plan = plan_from_json(json.dumps(values["snapshot_plan"]), name=f"{name}: plan")
                values |= {"snapshot_plan": plan, "snapshot_dtype": plan.dtype}
            values["train"] = _tuple(values.get("train", ()))
            hyper = {f.name: _tuple(values.pop(f.name)) for f in fields(Hyperparameters) if f.name in values}
            if not hyper.get("sigma_rels", True):
                del hyper["sigma_rels"]  # the file has [] beside a half-life
            check_types(Hyperparameters, hyper, name=name)
            check_types(cls, values, name=name)
            config = cls(hyper=Hyperparameters(**hyper), **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise error if name in str(error) else InputError(f"{name}: {error}") from error
            why = str(error).splitlines()[0]
            raise InputError(
                f"{name} must be the config of a run as it was written, got {why}: restore the file"
            ) from error
        if written not in (None, now):
            raise InputError(
                f"{name} must be the config of a run as it was written, got changed values: restore the file"
            )
        return config


def check_types(cls: type, values: dict[str, Any], *, name: str) -> None:
    """Check ``values`` of the dataclass ``cls``, of the file ``name``, against the types of its fields.

    Raises:
        InputError: one is of another type.
    """
    for key, hint in get_type_hints(cls).items():
        value = values.get(key)
        if key not in values:
            continue
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            if isinstance(value, bool) and hint is not bool:
                raise TypeCheckError("a number")
        except TypeCheckError:
            kind = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise InputError(f"{name}: {key} must be {kind}, got {str(value)[:40]!r}: correct it") from None


def _sum(values: dict[str, Any]) -> str:
    """A checksum of ``values``, whatever the spaces and line ends of their file."""
    return digest(json.dumps(values).encode())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(config: TrainConfig) -> None:
    for name, least in (("checkpoint", 1), ("keep", 1), ("status", 1), ("telemetry", 0), ("seed", 0)):
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
        if value is not None and value >= 1 << 63:
            raise InputError(f"{name} must be less than 2^63, got {str(value)[:24]}")
    if not 0 <= config.holdout < 1:
        raise InputError(f"holdout must be within [0, 1), got {config.holdout}: 0.05 is a twentieth")
    if config.flip and config.format.codec.vae is not None:
        raise InputError("flip mirrors images, got latents: encode mirrored images as well instead")
    plan, hyper = config.snapshot_plan, config.hyper
    if plan is None:
        return
    if hyper.half_life is not None or plan.sigma_rels != hyper.sigma_rels:
        kept = hyper.sigma_rels if hyper.half_life is None else f"a half-life of {hyper.half_life}"
        raise InputError(
            f"averages must be those of the snapshot plan, {plan.sigma_rels}, got {kept}: leave out one of the two"
        )
    if plan.dtype != config.snapshot_dtype:
        raise InputError(
            f"--snapshot-dtype must be that of the --snapshot-plan, {plan.dtype}, got {config.snapshot_dtype}: "
            "leave it out"
        )
    if isinstance(plan, TimedPlan) and plan.duration != hyper.duration:
        raise InputError(
            f"--duration must be that of the --snapshot-plan, {plan.duration} images, got {hyper.duration}: "
            "make a plan for this duration, or with --duration any"
        )
