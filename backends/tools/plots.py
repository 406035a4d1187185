"""How do errors and profiles look? Drawn with matplotlib, which is imported when something is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends.pipeline.files import write_atomically
from edm2_core.ema import ReconstructionError
from edm2_core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700")  # told apart by the colour-blind, dark on white


def figure(columns: int) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of so many panels in a row. Raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("pictures need matplotlib, which is not installed: pip install 'edm2[plot]'") from error
    drawn = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    return drawn, np.atleast_1d(drawn.subplots(1, columns)).tolist()


def save(drawn: "Figure", path: Path) -> None:
    """Write the figure as PNG, all or nothing."""
    write_atomically(path, lambda file: drawn.savefig(file, format="png", dpi=144))


def draw_errors(axes: "Axes", lengths: np.ndarray, curves: Mapping[str, ReconstructionError]) -> None:
    """Predicted errors over the length of the average wanted; dashed, the part that is storage rounding."""
    for colour, (label, error) in zip(_COLOURS, curves.items(), strict=False):
        axes.loglog(lengths, _visible(error.total), color=colour, label=label)
        axes.loglog(lengths, _visible(error.rounding), color=colour, linestyle="--", linewidth=1)
    axes.set_xlabel("relative length of the average, sigma_rel")
    axes.set_ylabel("predicted relative error (dashed: storage rounding)")
    axes.set_xticks(ticks := [t for t in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2) if lengths[0] <= t <= lengths[-1]])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def draw_profiles(axes: "Axes", t: np.ndarray, profiles: Mapping[float, tuple[np.ndarray, np.ndarray]]) -> None:
    """Each length's wanted profile, dashed, over the one that stored averages add up to."""
    for colour, (length, (wanted, made)) in zip(_COLOURS, profiles.items(), strict=False):
        axes.plot(t, made, color=colour, label=f"{length:g}")
        axes.plot(t, wanted, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("time, as a share of training up to the average")
    axes.set_ylabel("weight (dashed: the profile wanted)")
    axes.grid(alpha=0.3)
    axes.legend(title="sigma_rel")


def _visible(values: np.ndarray) -> Any:
    return np.where(values > 1e-8, values, np.nan)  # exact, where stored: nothing to draw on a logarithmic scale
