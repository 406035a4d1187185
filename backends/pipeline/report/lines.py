"""Charts of lines as data: :mod:`.plots` draws them into pictures, the page's script where they answer the pointer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import numpy as np

from edm2_core.ema import ReconstructionError

from .history import Curve, Place

_Name = TypeVar("_Name")
COLOURS = (  # distinct for the colour-blind; contrast of 3:1 or more on white and on a dark page
    "#0969da",
    "#cf222e",
    "#1a7f37",
    "#8250df",
    "#bf8700",
    "#0a8f9c",
    "#d6409f",
    "#6e7781",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """``x`` and ``y``, [points]; nan is a missing value. A thinned line has its extremes ``low`` and ``high``."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dashed: bool = False
    marked: bool = False
    """With a dot at each point."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A chart: its lines and the labels of its axes. ``images``: x counts images. ``y_span``: the range of y, else as
    the lines need it; ``x_end``: the end of an x that begins at 0."""

    lines: Sequence[Line]
    x: str
    y: str = ""
    images: bool = False
    x_log: bool = False
    y_log: bool = False
    y_span: tuple[float, float] | None = None
    x_end: float | None = None

    def to_json(self) -> str:
        """For the page's script. Values have four digits, more than can be seen."""
        lines = [
            {
                "label": line.label,
                "colour": line.colour,
                "dashed": line.dashed,
                "marked": line.marked,
                "points": [_numbers(part) for part in (line.x, line.y, line.low, line.high) if part is not None],
            }
            for line in self.lines
        ]
        chart = {name: value for name, value in vars(self).items() if name != "lines"}
        return json.dumps({**chart, "lines": lines}, separators=(",", ":"), allow_nan=False)

    def is_flat(self) -> bool:
        """Whether no line leaves its first value by more than a thousandth of it."""
        values = [line.y[np.isfinite(line.y)] for line in self.lines]
        return all(len(y) == 0 or np.ptp(y) <= 1e-3 * abs(y[0]) for y in values)


def palette(names: Iterable[_Name]) -> dict[_Name, str]:
    """A colour for each name, the same in all charts of a page."""
    return dict(zip(names, cycle(COLOURS), strict=False))


def over_images(curves: Mapping[str, Curve], *, colours: Mapping[str, str]) -> Lines:
    """Values over images seen; a thinned curve is its mean, over a band between its extremes."""
    return Lines(lines=[_line(label, curve, colours[label]) for label, curve in curves.items()], x=_SEEN, images=True)


def by_place(curves: Mapping[Place, Curve], *, until: float, span: tuple[float, float]) -> Lines:
    """Magnitudes over ``until`` images, on a logarithmic axis of range ``span``: a colour for each resolution, the
    decoder dashed."""
    colours = palette(sorted({place.size for place in curves}, reverse=True))
    return Lines(
        lines=[_line(str(p), curve, colours[p.size], dashed=p.role != "enc") for p, curve in curves.items()],
        x=_SEEN,
        images=True,
        x_end=max(until, 1),  # a run may have been measured once
        y_log=True,
        y_span=span,
    )


def by_noise(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, colours: Mapping[str, str], log: bool) -> Lines:
    """Lines over noise levels: by label, (sigma, values)."""
    drawn = [Line(label=label, x=x, y=y, colour=colours[label], marked=True) for label, (x, y) in lines.items()]
    return Lines(lines=drawn, x="noise level, sigma", x_log=True, y_log=log)


def errors(
    lengths: np.ndarray, curves: Mapping[str, ReconstructionError], colours: Mapping[str, str] | None = None
) -> Lines:
    """Predicted errors over the length of the reconstructed average; the part that is storage rounding is dashed."""
    colours = colours or palette(curves)
    lines = []
    for label, error in curves.items():
        lines.append(Line(label=label, x=lengths, y=_visible(error.total), colour=colours[label]))
        rounding = {"label": f"{label}: rounding", "y": _visible(error.rounding), "dashed": True}
        lines.append(Line(x=lengths, colour=colours[label], **rounding))
    return Lines(
        lines=lines, x="relative length of the average, sigma_rel", y="predicted error", x_log=True, y_log=True
    )


def swept(name: str, figures: Mapping[tuple[float, ...], float], metric: str, *, best: tuple[float, ...]) -> Lines:
    """Figures of points over the one setting that a sweep has varied; the best point is marked."""
    xs = sorted(x for (x,) in figures)
    points = Line(label=metric, x=np.array(xs), y=np.array([figures[(x,)] for x in xs]), colour=COLOURS[0], marked=True)
    mark = Line(label="best", x=np.array(best), y=np.array([figures[best]]), colour=COLOURS[1], marked=True)
    return Lines(lines=[points, mark], x=name, y=metric)


def limits(curves: Iterable[Curve]) -> tuple[float, float]:
    """The range of a logarithmic axis that shows all curves: at least a factor of 2. It begins at a number of one
    digit, which labels the end of the axis."""
    values = np.concatenate([np.ravel((curve.low, curve.high)) for curve in curves])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 10.0
    low, high = values.min() / 1.1, values.max() * 1.1
    widen = max(np.sqrt(2 * low / high), 1.0)
    low = low / widen
    unit = 10.0 ** np.floor(np.log10(low))
    return float(np.floor(low / unit) * unit), float(high * widen)


_SEEN = "images seen"


def _line(label: str, curve: Curve, colour: str, *, dashed: bool = False) -> Line:
    low, high = (curve.low, curve.high) if curve.thinned else (None, None)
    return Line(label=label, x=curve.x, y=curve.mean, low=low, high=high, colour=colour, dashed=dashed)


def _visible(values: np.ndarray) -> Any:
    return np.where(values > 1e-8, values, np.nan)  # 0 where stored, which a logarithmic axis cannot show


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in np.asarray(values, np.float64)]
