"""Pictures of charts. Matplotlib is imported when the first is drawn."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically
from edm2_core.errors import InputError

from .lines import COLOURS, Lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

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


def draw_lines(axes: "Axes", chart: Lines) -> None:
    """A chart of lines, with the band of each that was thinned."""
    for line in chart.lines:
        dash, dot = "--" if line.dashed else "-", "." if line.marked else ""
        axes.plot(
            line.x, line.y, color=line.colour, linestyle=dash, marker=dot, linewidth=1.2, label=_plain(line.label)
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.2, linewidth=0)
    if chart.x_end is not None:
        axes.set_xlim(0, chart.x_end)
    if chart.y_span is not None:
        axes.set_ylim(chart.y_span)  # first: without a positive value there is no logarithmic scale
    if chart.images:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis, log, scale in ((axes.xaxis, chart.x_log, axes.set_xscale), (axes.yaxis, chart.y_log, axes.set_yscale)):
        if log:
            scale("log", nonpositive="mask")
            _readable(axis)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.grid(alpha=0.3)
    _legend(axes)


def draw_profiles(axes: "Axes", t: np.ndarray, profiles: Mapping[float, tuple[np.ndarray, np.ndarray]]) -> None:
    """For each length the profile that stored averages add up to, and the wanted one dashed."""
    for colour, (length, (wanted, made)) in zip(cycle(COLOURS), profiles.items(), strict=False):
        axes.plot(t, made, color=colour, label=f"{length:g}")
        axes.plot(t, wanted, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("time, as a share of training up to the average")
    axes.set_ylabel("weight (dashed: the profile wanted)")
    axes.grid(alpha=0.3)
    axes.legend(title="sigma_rel")


def draw_map(
    axes: "Axes",
    names: Sequence[str],
    figures: Mapping[tuple[float, ...], float],
    metric: str,
    *,
    best: tuple[float, ...],
) -> None:
    """Figures of points over the first two of their settings; the best point is marked."""
    near = sorted(figures, key=lambda point: abs(figures[point] - figures[best]))
    points = near[::-1]  # the best on top, where more settings differ
    x, y = ([point[i] for point in points] for i in range(2))
    shown = axes.scatter(x, y, c=[figures[point] for point in points], s=80, cmap="viridis")
    axes.plot(best[0], best[1], color=COLOURS[1], marker="o", fillstyle="none", markersize=14, linestyle="none")
    axes.figure.colorbar(shown, ax=axes, label=_plain(metric))
    axes.set_xlabel(_plain(names[0]))
    axes.set_ylabel(_plain(names[1]))
    axes.grid(alpha=0.3)


def _readable(axis: "Axis") -> None:
    """Ticks at 1, 2, 5, 10 where a logarithmic axis is too short for powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    if low > 0 and high / low < 300:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 5, 7)))
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
