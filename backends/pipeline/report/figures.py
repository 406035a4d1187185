"""The section of metrics: over training, over what was swept, and the best of each."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from backends.pipeline.metrics.figures import Metric
from backends.pipeline.runs.evaluation import FIGURES, read_figures
from backends.pipeline.runs.folder import Run

from . import page
from .history import thin
from .lines import over_images, palette, swept
from .page import Chart, Section
from .plots import draw_map
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
        body += page.table(["figure", "best", "length", "after images", "images measured"], rows)
    text = (
        "Metrics against the data that a run, or the command that measured it, named. Of precision, recall, density, "
        "coverage and the Inception score the highest is the best, else the lowest."
    )
    return Section(title="Figures", text=text, body=body + page.charts(charts))


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
        title, chart = f"{metric} in training", over_images(drawn, colours=palette(drawn))
        yield canvas.chart(f"figure-{metric}", title, f"{title} over images seen, by length of the average", chart)


def _swept(lines: Mapping[str, Lines], canvas: Canvas) -> Iterator[Chart]:
    """A chart for each sweep: points of one metric over the same settings, with the same seeds and steps."""
    sweeps: dict[tuple[str, ...], dict[tuple[float, ...], Mapping[str, Any]]] = defaultdict(dict)
    for run, own in lines.items():
        for line in own:
            if isinstance(point := line.get("point"), dict) and point:
                key = (run, line["metric"], f"seeds {line.get('seeds')}, {line.get('steps')} steps", *point)
                sweeps[key][tuple(map(float, point.values()))] = line
    for (run, name, how, *names), points in sweeps.items():
        metric = Metric.called(name)
        values = {point: line["figures"][metric.main] for point, line in points.items()}
        best = min(values, key=lambda point: metric.loss(values[point]))
        title = f"{metric.main} by {' and '.join(names)}" + (f": {run}" if len(lines) > 1 else "")
        stem = f"sweep-{'-'.join((run, name, how, *names))}"
        description = f"{title}; {how}; best {values[best]:.4g} at {', '.join(f'{x:g}' for x in best)}"
        if len(names) == 1:
            yield canvas.chart(stem, title, description, swept(names[0], values, metric.main, best=best))
        else:
            draw = partial(draw_map, names=names, figures=values, metric=metric.main, best=best)
            yield Chart(title=title, description=description, picture=canvas.picture(stem, draw))


def _best(lines: Mapping[str, Lines]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for run, own in lines.items():
        figures = [(name, value, line) for line in own for name, value in line["figures"].items()]
        for name in dict.fromkeys(name for name, _, _ in figures):
            _, value, line = min(
                (one for one in figures if one[0] == name), key=lambda one: Metric.called(one[2]["metric"]).loss(one[1])
            )
            shown = name if len(lines) == 1 else f"{run}: {name}"
            cells = (f"{value:.5g}", *(str(line.get(key)) for key in ("length", "nimg", "count")))
            rows[shown] = list(map(page.cell, cells))
    return rows
