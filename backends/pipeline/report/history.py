"""A run's log and telemetry as arrays, and as curves that are short enough to draw.

A long curve is thinned to buckets of equally many values. Each bucket keeps its mean and its extremes, so that a spike
of a single line stays visible.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run

POINTS = 240  # most points of a drawn curve; more cannot be seen on a screen
_LOGGED = ("loss", "lr", "images_per_s", "nonfinite", "holdout")
_KINDS = ("activation", "weight", "gradient")
_COLUMNS = (*(f"{kind}_{part}" for kind in _KINDS for part in ("max", "mean")), "update")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """float64 [points]; nan is a missing value. ``low`` and ``high`` are ``mean`` unless the curve was thinned."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def thinned(self) -> bool:
        return self.low is not self.mean


class Place(NamedTuple):
    """A resolution of the U-Net's encoder (``role`` 'enc') or decoder ('dec')."""

    size: tuple[int, int]
    role: str

    def __str__(self) -> str:
        return f"{self.role.capitalize()} {self.size[0]}x{self.size[1]}"


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """Lines of telemetry.jsonl as arrays.

    ``nimg`` [lines]. ``magnitudes`` by column and place, each [lines]: of the blocks at a place the largest maximum, or
    the mean of the other columns. ``sigma`` [bins]; ``loss``, ``u`` and ``count`` [lines, bins].
    """

    nimg: np.ndarray
    magnitudes: Mapping[str, Mapping[Place, np.ndarray]]
    sigma: np.ndarray
    loss: np.ndarray
    u: np.ndarray
    count: np.ndarray

    def parts(self, number: int, /) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, mean loss [bins], mean u [bins]) of ``number`` equal parts of training, such as '0-25%'.

        Means are over images. Parts without measurements are left out.
        """
        edges = np.linspace(0, self.nimg.max() + 1, number + 1)
        for part, (start, end) in enumerate(pairwise(edges)):
            lines = (start <= self.nimg) & (self.nimg < end)
            if lines.any():
                loss, u = (_mean(values[lines], self.count[lines]) for values in (self.loss, self.u))
                yield f"{part * 100 // number}-{(part + 1) * 100 // number}%", loss, u


@dataclass(frozen=True, kw_only=True)
class History:
    """A run, read from its folder. ``log``: nimg, loss, lr, images_per_s, nonfinite and holdout, each float64 [lines].
    ``held_out``: the loss on held-out data by noise level, float64 [lines], empty where none is held out."""

    run: Run
    config: TrainConfig
    log: Mapping[str, np.ndarray]
    telemetry: Telemetry | None
    held_out: Mapping[float, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, /) -> "History":
        """Raises InputError: the folder is not a run's, or its config.json is damaged."""
        records = run.log()
        return cls(
            run=run,
            config=run.config(),
            log=_read_log(records),
            telemetry=_read_telemetry(run),
            held_out=_read_held_out(records),
        )


def _read_log(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    columns = {name: np.array([_number(record.get(name)) for record in records]) for name in _LOGGED}
    return {"nimg": np.array([record["nimg"] for record in records], np.float64), **columns}


def _read_held_out(records: Sequence[Mapping[str, Any]]) -> dict[float, np.ndarray]:
    rows = [dict(zip(r.get("holdout_sigma") or (), r.get("holdout_by_sigma") or (), strict=False)) for r in records]
    levels = sorted({level for row in rows for level in row})
    return {level: np.array([_number(row.get(level)) for row in rows]) for level in levels}


def _read_telemetry(run: Run) -> Telemetry | None:
    """None where there are no measurements. Lines whose shape differs from the first one's are left out."""
    nimg, rows, noise = [], [], []
    places: dict[str, Place] = {}
    sigma = np.empty(0)
    for record in run.telemetry():
        try:
            blocks, bins = record["blocks"], record["noise"]
            if not places:
                places = {
                    name: Place((int(b["size"][0]), int(b["size"][1])), str(b["role"])) for name, b in blocks.items()
                }
                sigma = np.array(bins["sigma"], np.float64)
            row = np.array([[blocks[name][column] for column in _COLUMNS] for name in places], np.float64)
            levels = np.array([bins[name] for name in ("loss", "u", "count")], np.float64)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if levels.shape == (3, len(sigma)):
            nimg.append(record["nimg"])
            rows.append(row)
            noise.append(levels)
    if not nimg:
        return None
    values, (loss, u, count) = np.stack(rows), np.stack(noise, axis=1)
    return Telemetry(
        nimg=np.array(nimg, np.float64),
        magnitudes={column: _by_place(column, values[:, :, i], places) for i, column in enumerate(_COLUMNS)},
        sigma=sigma,
        loss=loss,
        u=u,
        count=count,
    )


def _by_place(column: str, values: np.ndarray, places: Mapping[str, Place]) -> dict[Place, np.ndarray]:
    """``values`` [lines, blocks] of one column by place, in the order of the U-Net."""
    by_place = {}
    for place in sorted(set(places.values()), key=lambda p: (p.role != "enc", -max(p.size))):
        own = values[:, [own == place for own in places.values()]]
        by_place[place] = np.fmax.reduce(own, axis=1) if column.endswith("max") else _mean(own.T, np.ones_like(own.T))
    return by_place


def thin(x: np.ndarray, y: np.ndarray, /, *, most: int = POINTS) -> Curve:
    """The curve ``y`` over ``x``, float64 [n], with at most ``most`` points. A nan in ``y`` is a missing value."""
    if len(x) <= most:
        return Curve(x=x, mean=y, low=y, high=y)
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    buckets = np.split(y, starts[1:])
    return Curve(
        x=np.add.reduceat(x, starts) / np.diff([*starts, len(x)]),
        mean=np.array([_mean(bucket, np.ones_like(bucket)) for bucket in buckets]),
        low=np.fmin.reduceat(y, starts),
        high=np.fmax.reduceat(y, starts),
    )


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean over the first axis of finite values; nan where there is none."""
    finite = np.isfinite(values)
    total = np.where(finite, weights, 0).sum(axis=0)
    summed = (np.where(finite, values, 0) * weights).sum(axis=0)
    return np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
