"""The config of a run, made from options, data and the run that is resumed; checks what a resumed run may change."""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from backends.pipeline.checkpoints.remote import is_url
from backends.pipeline.data.batches import prepared, stored_batch
from backends.pipeline.data.datasets import DIGITS, RULE, Dataset, open_dataset
from edm2_core.ema import SnapshotPlan, plan_from_json
from edm2_core.errors import InputError
from edm2_core.ladder import Rung, Switches
from edm2_core.network import NetworkConfig, plan
from edm2_core.presets import AUTO, Hyperparameters, on_rung, preset, takes_any_data

from .command_line import flag
from .config import DataSummary, TrainConfig
from .options import NETWORK_FIELDS, TrainOptions, preset_in

FREE = ("duration", "status", "checkpoint", "keep", "telemetry", "skip_broken")
"""Fields that a resumed run may change."""


def configure(
    dataset: Dataset,
    *,
    preset_name: str = "digits",
    ladder: Rung = "G",
    unconditional: bool = False,
    network: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainConfig:
    """The config of a fresh run on ``dataset``: a preset, on a rung of the ladder, fitted to the data.

    Args:
        dataset: gives the network its resolution, channels and labels.
        preset_name, ladder: the base; see :mod:`edm2_core.presets`.
        unconditional: train without labels.
        network: changed fields of :class:`~edm2_core.network.NetworkConfig`, such as ``{"model_channels": 64}``.
        changes: changed fields of :class:`~edm2_core.presets.Hyperparameters` or of :class:`TrainConfig`.

    Raises:
        InputError: an unknown preset, a value out of range, or data without labels for a conditional preset.
        TypeError: an unknown field.
    """
    base = on_rung(preset(preset_name), ladder)
    hyper_names = {field.name for field in fields(Hyperparameters)}
    hyper = replace(base.hyper, **{name: value for name, value in changes.items() if name in hyper_names})
    rest = {name: value for name, value in changes.items() if name not in hyper_names}
    rest.setdefault("data", dataset.spec)
    config = TrainConfig(preset=preset_name, network=replace(base.network, **network or {}), hyper=hyper, **rest)
    return fit(config, dataset, unconditional=unconditional)


def fit(config: TrainConfig, dataset: Dataset, *, unconditional: bool = False) -> TrainConfig:
    """``config`` with resolution, channels and labels of ``dataset``, and with its intervals filled in.

    Raises:
        InputError: a preset for data of another size or other channels, or a conditional one for data without labels.
    """
    _check_data(config, dataset)
    conditional = config.network.label_dim > 0 and not unconditional
    if conditional and not dataset.label_dim:
        raise InputError(
            f"preset {config.preset} must have data with labels, got none in {dataset.name}: "
            "add a dataset.json with labels, or give --unconditional"
        )
    channels, height, width = dataset.shape
    network = replace(
        config.network,
        img_resolution=(height, width),
        img_channels=channels,
        cond_channels=dataset.cond_channels,
        label_dim=dataset.label_dim if conditional else 0,
    )
    return replace(config, network=network, data_summary=DataSummary.of(dataset)).intervals_filled()


def _check_data(config: TrainConfig, dataset: Dataset) -> None:
    network = config.network
    need, got = (network.img_channels, *network.image_size), dataset.shape
    if got != need and not takes_any_data(config.preset):
        kind = ", which are latents" if need[0] == 4 else ""
        raise InputError(
            f"preset {config.preset} must have images of {_size(need)} with {need[0]} channels{kind}, got {_size(got)} "
            f"with {got[0]} in {dataset.name}: resize (edm2 dataset convert) or encode them (edm2 dataset encode), or "
            "leave --preset out"
        )


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]}x{shape[1]}"


def data_spec(options: TrainOptions, previous: TrainConfig | None = None) -> str:
    """The data to open: 'digits', an absolute path, or a URL.

    Raises:
        InputError: no data, with a preset for others than digits.
    """
    if options.data is not None:
        kept = options.data == DIGITS or is_url(options.data)
        return options.data if kept else str(Path(options.data).absolute())
    if previous is not None:
        return previous.data
    if options.preset not in (AUTO, DIGITS):
        raise InputError(f"--data must be given with --preset {options.preset}: {RULE}")
    return DIGITS


def open_data(options: TrainOptions, previous: TrainConfig | None = None) -> Dataset:
    """The data of a run, and their condition; those of a resumed run with the codecs that it recorded.

    Raises:
        InputError: as :func:`data_spec` and :func:`~backends.pipeline.data.datasets.open_dataset`.
    """
    config = options.config if previous is None else previous
    format = None if previous is None else previous.format
    spec = data_spec(options, previous)
    return open_dataset(spec, kind=config.data_format, condition=config.condition, format=format)


def resolve(options: TrainOptions, dataset: Dataset, previous: TrainConfig | None = None) -> TrainConfig:
    """The config of a run on ``dataset``, the data of :func:`data_spec`. ``previous``: config of the resumed run.

    Raises:
        InputError: no labels for a conditional preset; a value out of range; a batch that is not divisible; or, when
            resuming, an option or data that differ from the run's.
    """
    if previous is None:
        config = _fresh(options, dataset)
    else:
        _check_unchanged(options, dataset, previous)
        config = with_free_options(previous, options.config)
    microbatches(config.hyper.batch, options.machine.batch_per_device, world=1)
    for pattern in config.train:
        if not fnmatch.filter(plan(config.network).parameters, pattern):
            raise InputError(
                f"--train must match names of weights, such as 'unet.dec.*', got {pattern!r}: none matches"
            )
    if config.init is None and "unet.out_gain" in config.frozen:
        raise InputError(
            "--train must match unet.out_gain of a fresh network, which is 0 and leaves others without gradients, "
            f"got {' '.join(config.train)}: add it, or start from a trained network with --init"
        )
    return config


def with_free_options(previous: TrainConfig, config: TrainConfig, /) -> TrainConfig:
    """``previous`` with what a resumed run may change taken from ``config``."""
    free = {name: getattr(config, name) for name in FREE if name != "duration"}
    return replace(previous, hyper=replace(previous.hyper, duration=config.hyper.duration), **free)


def microbatches(batch: int, per_device: int | None, *, world: int) -> int:
    """Number of microbatches of ``per_device`` images (None: one) in the share of a batch of each of ``world`` devices.

    Raises:
        InputError: the batch cannot be divided into equal parts.
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


def _fresh(options: TrainOptions, dataset: Dataset) -> TrainConfig:
    config = replace(
        options.config,
        network=_network(options, dataset),
        data=data_spec(options),
    )
    if options.snapshot_plan is not None:
        plan = _read_plan(options.snapshot_plan)
        hyper = replace(config.hyper, sigma_rels=plan.sigma_rels, half_life=None)
        config = replace(config, hyper=hyper, snapshot_plan=plan, snapshot_dtype=plan.dtype)
    return fit(config, dataset, unconditional=options.unconditional)


def _network(options: TrainOptions, dataset: Dataset) -> NetworkConfig:
    """The preset's network with what the options change, of the size of the data: so errors name that size."""
    changes = options.network.chosen()
    if changes.get("sigma_data") == "auto":
        changes["sigma_data"] = measured_sigma(dataset)
    network = options.config.network
    if takes_any_data(options.config.preset):
        channels, *size = dataset.shape
        changes |= {"img_resolution": tuple(size), "img_channels": channels}
    if takes_any_data(options.config.preset) and not options.unconditional:
        changes["label_dim"] = dataset.label_dim
    changes |= {"dropout": options.dropout, "label_dropout": options.label_dropout}
    return replace(network, **_switches(options), **changes)


def measured_sigma(dataset: Dataset, /) -> float:
    """The standard deviation of the data as a network sees them, over a thousand samples."""
    some = np.linspace(0, len(dataset) - 1, min(len(dataset), 1000)).astype(np.int64)
    images, _, _ = prepared(stored_batch(dataset, some), dataset.format, label_dim=0)
    return round(float(images.std(dtype=np.float64)), 4)


def _read_plan(path: Path) -> SnapshotPlan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--snapshot-plan must be a file of edm2 plan, got {path}, which cannot be read") from error
    return plan_from_json(text, name=str(path))


def _switches(options: TrainOptions) -> dict[str, Any]:
    """The switches that ``options`` change. Raises InputError for an unknown name."""
    changes, names = dict(options.switches), [field.name for field in fields(Switches) if field.name != "ladder"]
    if unknown := sorted(set(changes) - set(names)):
        raise InputError(f"--switches must be of {', '.join(names)}, got {unknown[0]}")
    return changes


def _check_unchanged(options: TrainOptions, dataset: Dataset, previous: TrainConfig) -> None:
    for name, was, wanted in _fixed_options(options, previous):
        if wanted != was:
            raise InputError(
                f"{name} must stay {_text(was)} when a run is resumed, got {_text(wanted)}: "
                "leave it out, or choose another --outdir"
            )
    before, now = previous.data_summary, DataSummary.of(dataset)
    for name in vars(now) if before is not None else ():
        if (got := getattr(now, name)) != (was := getattr(before, name)):
            raise InputError(
                f"data must be the same as when the run began, got {name} {_text(got)} for {_text(was)} in "
                f"{previous.data}: restore them, or choose another --outdir"
            )


def _fixed_options(options: TrainOptions, previous: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """(flag, value of the run, value of the option) for each option that a resumed run may not change."""
    for now, before in ((options.config.hyper, previous.hyper), (options.config, previous)):
        for field in fields(now):
            if field.name not in (*FREE, "hyper"):
                yield flag(field.name), getattr(before, field.name), getattr(now, field.name)
    network = previous.network
    if options.preset not in (AUTO, previous.preset):
        yield "--preset", previous.preset, options.preset
    chosen = options.network.chosen()
    for name, of_network in NETWORK_FIELDS.items():
        if chosen.get(of_network, "auto") != "auto":
            yield flag(name), getattr(network, of_network), chosen[of_network]
    if options.config_file is not None:
        same = _with_file(options, network) == network
        yield "--config", "the network of the run", "the network of the run" if same else "another"
    yield "--data", previous.data, data_spec(options, previous)
    yield "--dropout", network.dropout, options.dropout
    yield "--label-dropout", network.label_dropout, options.label_dropout
    yield "--ladder", network.ladder, options.ladder
    if options.unconditional:
        yield "--unconditional", network.label_dim == 0, True
    for name, value in _switches(options).items():
        yield f"--switches {name}", getattr(network.switches, name), value
    if options.snapshot_plan is not None:
        yield "--snapshot-plan", _plan_text(previous.snapshot_plan), _plan_text(_read_plan(options.snapshot_plan))


def _with_file(options: TrainOptions, network: NetworkConfig) -> NetworkConfig:
    """The network in the file of --config with what the options and the data changed in that of the run."""
    assert options.config_file is not None
    of_data = ("img_resolution", "img_channels", "cond_channels", "label_dim")
    changed = {*of_data, "dropout", "label_dropout", *options.network.chosen()}
    given = preset_in(options.config_file).network
    return replace(given, **_switches(options), **{name: getattr(network, name) for name in changed})


def _plan_text(plan: SnapshotPlan | None) -> str:
    return "none" if plan is None else json.dumps(json.loads(plan.to_json()))


def _text(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
