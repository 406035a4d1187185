"""The section of metrics: over training, over what was swept, and the best of each."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from backends.pipeline.runs.evaluation import FIGURES, read_figures
from backends.pipeline.runs.folder import Run

from . import page
from .history import thin
from .page import Chart, Section
from .plots import draw_curves, draw_sweep, palette
from .sections import Canvas

Lines = Sequence[Mapping[str, Any]]


def measured(runs: Mapping[str, Run], canvas: Canvas, /) -> Section:
    """Figures of figures.jsonl of each run."""
    lines = {name: read_figures(run.path / FIGURES) for name, run in runs.items()}
    body = "".join(
        page.note(f"{name} has no figures: measure it with edm2 evaluate or edm2 sweep, or train with --evaluate.")
        for name, own in lines.items()
        if not own
    )
    charts = [*_over_training(lines, canvas), *_swept(lines, canvas)]
    if rows := _best(lines):
        body += page.table(["lowest", "length", "after images", "images measured"], rows)
    text = "Metrics against the data that a run, or the command that measured it, named; the lower the better."
    return Section(title="Figures", text=text, body=body + page.charts(charts, columns=2))


def _over_training(lines: Mapping[str, Lines], canvas: Canvas) -> Iterator[Chart]:
    curves: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run, own in lines.items():
        for line in own:
            if line.get("training"):
                label = f"{line['length']:g}" if len(lines) == 1 else f"{run}, {line['length']:g}"
                for metric, value in line["figures"].items():
                    curves[metric][label][line["nimg"]] = value
    for metric, by_label in curves.items():
        drawn = {
            label: thin(np.array(sorted(points), float), np.array([points[x] for x in sorted(points)]))
            for label, points in by_label.items()
        }
        draw = partial(draw_curves, curves=drawn, colours=palette(drawn))
        title = f"{metric} in training"
        yield canvas.chart(f"figure-{metric}", title, f"{title} over images seen, by length of the average", draw)


def _swept(lines: Mapping[str, Lines], canvas: Canvas) -> Iterator[Chart]:
    sweeps: dict[tuple[str, str, tuple[str, ...]], dict[tuple[float, ...], float]] = defaultdict(dict)
    for run, own in lines.items():
        for line in own:
            if isinstance(point := line.get("point"), dict) and point:
                metric, value = next(iter(line["figures"].items()))
                sweeps[run, metric, tuple(point)][tuple(map(float, point.values()))] = value
    for (run, metric, names), points in sweeps.items():
        title = f"{metric} by {' and '.join(names)}" + (f": {run}" if len(lines) > 1 else "")
        draw = partial(draw_sweep, names=names, figures=points, metric=metric)
        best = min(points, key=lambda point: points[point])
        description = f"{title}; lowest {points[best]:.4g} at {', '.join(f'{x:g}' for x in best)}"
        yield canvas.chart(f"sweep-{run}-{metric}-{'-'.join(names)}", title, description, draw)


def _best(lines: Mapping[str, Lines]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for run, own in lines.items():
        for metric in dict.fromkeys(name for line in own for name in line["figures"]):
            line = min((line for line in own if metric in line["figures"]), key=lambda one: one["figures"][metric])
            name = metric if len(lines) == 1 else f"{run}: {metric}"
            rows[name] = [f"{line['figures'][metric]:.5g}", *(str(line.get(k)) for k in ("length", "nimg", "count"))]
    return rows
