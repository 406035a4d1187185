"""Charts of errors, profiles and training curves. Matplotlib is imported when the first is drawn."""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically
from edm2_core.ema import ReconstructionError
from edm2_core.errors import InputError

from .history import Curve, Place

_Name = TypeVar("_Name")
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_COLOURS = (  # distinct for the colour-blind; contrast of 3:1 or more on white and on a dark page
    "#0969da",
    "#cf222e",
    "#1a7f37",
    "#8250df",
    "#bf8700",
    "#0a8f9c",
    "#d6409f",
    "#6e7781",
)

_LONGEST, _LEGEND = 32, 64  # letters of a label, and of a row of a legend


def figure(columns: int, *, size: tuple[float, float] = (6.4, 4.4)) -> "tuple[Figure, Sequence[Axes]]":
    """A figure with a row of panels, each of ``size`` inches. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("pictures need matplotlib, which is not installed: pip install 'edm2[run]'") from error
    drawn = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
    return drawn, np.atleast_1d(drawn.subplots(1, columns)).tolist()


def save(drawn: "Figure", path: Path) -> None:
    """Write the figure as PNG, all or nothing."""
    write_atomically(path, lambda file: drawn.savefig(file, format="png", dpi=144))


def svg(drawn: "Figure", *, name: str) -> str:
    """The figure as an SVG element that scales to its container and takes the page's text colour.

    Its ids begin with ``name``, which must be unique on the page.
    """
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    made = text.getvalue()
    made = made[made.index("<svg") :].replace("#000000", "currentColor").replace("xlink:href", "href")
    made = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', made, count=1)
    made = re.sub(r'<g id="[^"]*"', "<g", made)  # never referred to
    made = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", made)
    # one decimal is enough: a tenth of a point is less than a pixel
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), made)


def palette(names: Iterable[_Name]) -> dict[_Name, str]:
    """A colour for each name, the same in all charts of a page."""
    return dict(zip(names, cycle(_COLOURS), strict=False))


def draw_errors(
    axes: "Axes",
    lengths: np.ndarray,
    curves: Mapping[str, ReconstructionError],
    colours: Mapping[str, str] | None = None,
) -> None:
    """Predicted errors over the length of the reconstructed average; the part that is storage rounding is dashed."""
    colours = colours or palette(curves)
    for label, error in curves.items():
        axes.loglog(lengths, _visible(error.total), color=colours[label], label=_plain(label))
        axes.loglog(lengths, _visible(error.rounding), color=colours[label], linestyle="--", linewidth=1)
    axes.set_xlabel("relative length of the average, sigma_rel")
    axes.set_ylabel("predicted error (dashed: rounding)")
    axes.set_xticks(ticks := [t for t in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2) if lengths[0] <= t <= lengths[-1]])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)


def draw_profiles(axes: "Axes", t: np.ndarray, profiles: Mapping[float, tuple[np.ndarray, np.ndarray]]) -> None:
    """For each length the profile that stored averages add up to, and the wanted one dashed."""
    for colour, (length, (wanted, made)) in zip(cycle(_COLOURS), profiles.items(), strict=False):
        axes.plot(t, made, color=colour, label=f"{length:g}")
        axes.plot(t, wanted, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("time, as a share of training up to the average")
    axes.set_ylabel("weight (dashed: the profile wanted)")
    axes.grid(alpha=0.3)
    axes.legend(title="sigma_rel")


def draw_curves(axes: "Axes", curves: Mapping[str, Curve], *, colours: Mapping[str, str]) -> None:
    """Values over images seen; a thinned curve is its mean, over a band between its extremes."""
    for label, curve in curves.items():
        _line(axes, curve, label=_plain(label), color=colours[label])
    _over_images(axes)


def draw_places(axes: "Axes", curves: Mapping[Place, Curve], *, until: float, span: tuple[float, float]) -> None:
    """Magnitudes over ``until`` images, on a logarithmic axis of range ``span``: a colour for each resolution, the
    decoder dashed."""
    colours = palette(sorted({place.size for place in curves}, reverse=True))
    for place, curve in curves.items():
        style = "-" if place.role == "enc" else "--"
        _line(axes, curve, label=str(place), color=colours[place.size], linestyle=style)
    axes.set_xlim(0, max(until, 1))  # a run may have been measured once
    axes.set_ylim(span)  # first: without a positive value there is no logarithmic scale
    axes.set_yscale("log", nonpositive="mask")
    _readable(axes.yaxis, span)
    _over_images(axes)


def draw_by_noise(
    axes: "Axes", lines: Mapping[str, tuple[np.ndarray, np.ndarray]], *, colours: Mapping[str, str], log: bool
) -> None:
    """Lines over noise levels: by label, (sigma, values)."""
    for label, (sigma, values) in lines.items():
        axes.plot(sigma, values, color=colours[label], label=_plain(label), marker=".")
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("noise level, sigma")
    axes.grid(alpha=0.3)
    if log:
        _readable(axes.yaxis, axes.get_ylim())
    _legend(axes)


def draw_sweep(
    axes: "Axes",
    names: Sequence[str],
    figures: Mapping[tuple[float, ...], float],
    metric: str,
    *,
    best: tuple[float, ...],
) -> None:
    """Figures of points: a curve over one setting, or a map over two, of others the best; the best point is marked."""
    if len(names) == 1:
        xs = sorted(x for (x,) in figures)
        axes.plot(xs, [figures[(x,)] for x in xs], color=_COLOURS[0], marker=".")
        axes.plot(best[0], figures[best], color=_COLOURS[1], marker="o", linestyle="none")
        axes.set_ylabel(_plain(metric))
    else:
        near = sorted(figures, key=lambda point: abs(figures[point] - figures[best]))
        points = near[::-1]  # the best on top, where more settings differ
        x, y = ([point[i] for point in points] for i in range(2))
        shown = axes.scatter(x, y, c=[figures[point] for point in points], s=80, cmap="viridis")
        axes.plot(best[0], best[1], color=_COLOURS[1], marker="o", fillstyle="none", markersize=14, linestyle="none")
        axes.figure.colorbar(shown, ax=axes, label=_plain(metric))
        axes.set_ylabel(_plain(names[1]))
    axes.set_xlabel(_plain(names[0]))
    axes.grid(alpha=0.3)


def limits(curves: Iterable[Curve]) -> tuple[float, float]:
    """The range of a logarithmic axis that shows all curves: at least a factor of 2."""
    values = np.concatenate([np.ravel((curve.low, curve.high)) for curve in curves])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 10.0
    low, high = values.min() / 1.1, values.max() * 1.1
    widen = max(np.sqrt(2 * low / high), 1.0)
    return float(low / widen), float(high * widen)


def _line(axes: "Axes", curve: Curve, **style: Any) -> None:
    axes.plot(curve.x, curve.mean, linewidth=1.2, **style)
    if curve.thinned:
        axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)


def _over_images(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    _legend(axes)


def _readable(axis: "Axis", span: tuple[float, float]) -> None:
    """Ticks at 1, 2, 5, 10 where a logarithmic axis is too short for powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if span[1] / span[0] < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span[1] / span[0] > 10 else (1, 1.5, 2, 3, 5, 7)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _plain(label: str) -> str:
    """``label`` for a legend: dollars are escaped, a leading _ does not hide it, and a long one keeps its end."""
    shown = label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"
    return re.sub("^_", "\u200b_", shown.replace("$", r"\$"))


def _legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(_LEGEND // (max(map(len, labels)) + 5), 1)
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=min(columns, 4), fontsize="small", frameon=False
        )


def _visible(values: np.ndarray) -> Any:
    return np.where(values > 1e-8, values, np.nan)  # 0 where stored, which a logarithmic axis cannot show
