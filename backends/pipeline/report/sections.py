"""The sections of the report, each a function from the runs to a :class:`~.page.Section`.

Several runs get a line or a column each, on the same axes. What is missing is replaced by a note that says why.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.reconstruct import WITHIN
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.pictures import save_rows
from backends.pipeline.runs.progress import Progress
from backends.ports import OpenSampler
from edm2_core.ema import reconstruction_error
from edm2_core.errors import InputError
from edm2_core.network import parameter_count
from edm2_core.presets import PRESETS

from . import page
from .history import POINTS, Curve, History, thin
from .lines import Lines, by_noise, by_place, errors, limits, over_images, palette
from .page import Chart, Section
from .plots import draw_lines, figure, save
from .strips import Strip, combine, draw_strips, traditional, within_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (4.6, 3.2)  # inches, small enough for its text to be readable on a phone
_ERRORS_AT = np.geomspace(0.01, 0.28, 120)
_QUARTERS = 4
_LOGGED = {"loss": "Training loss", "lr": "Learning rate", "images_per_s": "Images per second"}
_MAGNITUDES = {
    "activation_max": "Activations, maximum",
    "activation_mean": "Activations, mean",
    "weight_max": "Weights, maximum",
    "weight_mean": "Weights, mean",
    "gradient_max": "Gradients, maximum",
    "gradient_mean": "Gradients, mean",
    "update": "Relative update of a step",
}

Histories = Mapping[str, History]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which averages are sampled, and how.

    ``sigma_rels`` None: the usual lengths, as far as their predicted error allows. ``open_port`` None: nothing is
    sampled; otherwise it returns a port's name and sampler, or None where no port is installed.
    """

    sigma_rels: Sequence[float] | None
    seeds: Sequence[int]
    steps: int
    open_port: Callable[[], tuple[str, OpenSampler] | None] | None


class Canvas:
    """Draws charts for the page, and writes each as a PNG into ``outdir``. ``count`` is how many it has written."""

    def __init__(self, outdir: Path) -> None:
        self.outdir, self.count = outdir, 0

    def chart(self, name: str, title: str, description: str, lines: Lines) -> Chart:
        self.picture(name, partial(draw_lines, chart=lines))
        return Chart(title=title, description=description, lines=lines)

    def picture(self, name: str, draw: "Callable[[Axes], None]") -> Path:
        drawn, (axes,) = figure(1, size=_PANEL)
        draw(axes)
        path = self._path(name)
        save(drawn, path)
        return path

    def rows(self, name: str, strips: Sequence[Strip]) -> None:
        save_rows(self._path(name), [(str(strip.length), strip.images) for strip in strips])

    def _path(self, name: str) -> Path:
        self.count += 1
        return self.outdir / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.png"


def summary(histories: Histories, /) -> str:
    return page.cards({name: _facts(history) for name, history in histories.items()})


def _facts(history: History) -> Iterator[str]:
    config, log = history.config, history.log
    size = parameter_count(config.network) / 1e6
    yield f"{config.preset}, CONFIG {config.network.ladder}, {size:.2f} M parameters"
    yield f"{int(log['nimg'].max(initial=0)):,} of {config.hyper.duration:,} images"
    if len(log["nimg"]):
        yield f"loss {log['loss'][-1]:.4g} at the end, {np.median(log['images_per_s']):.4g} images/s"
    if zeroed := int(np.nansum(log["nonfinite"])):
        yield f"{zeroed:,} gradients were not finite, and taken as 0"


def loss(histories: Histories, canvas: Canvas, /) -> Section:
    logged = {name: history.log for name, history in histories.items() if len(history.log["nimg"])}
    charts = []
    for column, title in _LOGGED.items() if logged else ():
        curves = {name: thin(log["nimg"], log[column]) for name, log in logged.items()}
        description = f"{title} over images seen. {_ends(curves)}"
        lines = over_images(curves, colours=palette(histories))
        charts.append(canvas.chart(column, title, description, lines))
    charts += _held_out(histories, canvas)
    text = (
        "The loss is the weighted total: lambda(sigma) / exp(u) times the mean square error, plus the learned u(sigma) "
        "(arXiv 2312.02696, Eq. 21). With learned weighting a negative loss is normal: small errors make u negative. "
        f"A curve of more than {POINTS} values is thinned to the means of {POINTS} buckets, in a band from their "
        "smallest to their largest values."
    )
    missing = (f"{name} has no line of log yet." for name in histories if name not in logged)
    return Section(title="Loss and speed", text=text, body=_notes(missing) + page.charts(charts))


def _held_out(histories: Histories, canvas: Canvas) -> Iterator[Chart]:
    """The loss on held-out data, and for a single run that by noise level."""
    held = {name: history for name, history in histories.items() if history.held_out}
    lines = {name: (history.log["nimg"], history.log["holdout"]) for name, history in held.items()}
    charts = {"holdout": ("Held-out loss", lines)} if lines else {}
    if len(histories) == 1 and held:
        (history,) = held.values()
        levels = {f"sigma {s:.2g}": (history.log["nimg"], values) for s, values in history.held_out.items()}
        charts["holdout-by-noise"] = ("Held-out loss by noise level", levels)
    for stem, (title, values) in charts.items():
        curves = {label: thin(*line) for label, line in values.items()}
        description = f"{title} over images seen: where it turns up, the network learns its own images by heart"
        colours = palette(curves if stem != "holdout" else histories)
        yield canvas.chart(stem, title, description, over_images(curves, colours=colours))


def noise(histories: Histories, canvas: Canvas, /) -> Section:
    alone = len(histories) == 1
    losses, uncertainties = {}, {}
    for name, history in histories.items():
        if (telemetry := history.telemetry) is None:
            continue
        quarters = list(telemetry.parts(_QUARTERS))
        for quarter, of_loss, of_u in quarters if alone else quarters[-1:]:
            label = quarter if alone else name
            losses[label] = telemetry.sigma, of_loss
            if np.isfinite(of_u).any():
                uncertainties[label] = telemetry.sigma, of_u
    charts, colours = [], palette(losses if alone else histories)
    for stem, title, lines, log in (
        ("loss-by-noise", "Unweighted loss", losses, True),
        ("u-by-noise", "Uncertainty u(sigma)", uncertainties, False),
    ):
        if lines:
            description = f"{title} by noise level, a line for each of {', '.join(lines)}"
            charts.append(canvas.chart(stem, title, description, by_noise(lines, colours=colours, log=log)))
    which = "a line for each quarter of training" if alone else "the last quarter of each run's training"
    text = (
        f"By noise level, {which}. The unweighted loss is lambda(sigma) times the mean square error, without u. "
        "Training makes u its logarithm, so that all noise levels come to weigh the same; on CONFIG A there is no u."
    )
    return Section(title="Loss by noise level", text=text, body=_unmeasured(histories) + page.charts(charts))


def magnitudes(histories: Histories, canvas: Canvas, /) -> Section:
    measured = {name: history.telemetry for name, history in histories.items() if history.telemetry is not None}
    curves = {
        (column, name): {place: thin(t.nimg, values) for place, values in t.magnitudes[column].items()}
        for column in _MAGNITUDES
        for name, t in measured.items()
    }
    charts, flat, until = [], [], max((t.nimg.max() for t in measured.values()), default=0.0)
    for (column, name), places in curves.items():
        title = _MAGNITUDES[column] if len(histories) == 1 else f"{_MAGNITUDES[column]}: {name}"
        stem = column if len(histories) == 1 else f"{column}-{name}"
        span = limits([curve for other in measured for curve in curves[column, other].values()])
        description = f"{title}, over images seen. {_ends({str(place): curve for place, curve in places.items()})}"
        lines = by_place(places, until=until, span=span)
        if lines.is_flat():
            flat.append(f"{title}: {_values(lines)} throughout.")
        else:
            charts.append(canvas.chart(stem, title, description, lines))
    text = (
        "By resolution of the U-Net's encoder and decoder, as in Figure 15 of the paper. The magnitude of a feature is "
        "its root mean square (Eq. 3); a maximum is over the features of all blocks there, a mean over them. The "
        "relative update is how far a step moves a block's weights, as a share of their norm."
    )
    columns = len(measured) if 1 < len(measured) <= 3 else 0
    body = _unmeasured(histories) + page.charts(charts, columns=columns) + _notes(flat)
    return Section(title="Magnitudes", text=text, body=body)


def lengths(histories: Histories, canvas: Canvas, sampling: Sampling, /) -> Section:
    notes: list[str] = []
    combinations: dict[str, Combination] = {}
    for name, history in histories.items():
        try:
            combinations[name] = combine(history, sampling.sigma_rels)
        except InputError as error:
            notes.append(f"{name}: {error}.")
    strips, how = (
        _sample(combinations, {n: h.run for n, h in histories.items()}, sampling, notes) if combinations else ({}, "")
    )
    for name, own in strips.items():
        canvas.rows("lengths" if len(histories) == 1 else f"lengths-{name}", own)
    predicted = {name: reconstruction_error(**made.arguments(_ERRORS_AT)) for name, made in combinations.items()}
    charts = []
    if predicted:
        worst = (f"{name}: at most {error.total.max():.2g}" for name, error in predicted.items())
        description = f"Predicted error of an average, over its length. {'; '.join(worst)}"
        lines = errors(_ERRORS_AT, predicted, palette(histories))
        charts.append(canvas.chart("error", "Error of reconstruction", description, lines))
    text = f"The same seeds from averages of many lengths, reconstructed from the stored ones. {how}"
    body = _notes(notes) + (page.slider(strips, sampling.seeds) if strips else "") + page.charts(charts)
    return Section(title="Length of the average", text=text, body=body)


def _sample(
    combinations: Mapping[str, Combination], runs: Mapping[str, Run], sampling: Sampling, notes: list[str]
) -> tuple[dict[str, list[Strip]], str]:
    """Each run's strips, and how they were made; reasons why there are none are appended to ``notes``."""
    if sampling.open_port is None:
        notes.append("No seeds were sampled, as asked.")
        return {}, ""
    if (opened := sampling.open_port()) is None:
        notes.append(
            "No port is installed to sample with, so there are no pictures: pip install 'edm2[torch]' for example."
        )
        return {}, ""
    port, open_sampler = opened
    strips: dict[str, list[Strip]] = {}
    for name, combination in combinations.items():
        chosen = combination.only(sampling.sigma_rels or within_error(combination))
        try:
            total = len(traditional(chosen)) + len(chosen.sigma_rels)
            with Progress(total=total, unit="averages") as progress:
                strips[name] = []
                for strip in draw_strips(chosen, runs[name], open_sampler, seeds=sampling.seeds, steps=sampling.steps):
                    strips[name].append(strip)
                    progress.advance(1)
                progress.report()
        except InputError as error:
            notes.append(f"{name}: {error}.")
            del strips[name]
    left_out = "" if sampling.sigma_rels else f" Lengths whose predicted error is more than {WITHIN:.0%} are left out."
    return strips, f"Sampled with {port} in {sampling.steps} steps.{left_out}"


def differences(histories: Histories, /) -> list[Section]:
    """The options that differ between several runs; no section for one run."""
    if len(histories) == 1:
        return []
    differing = {name: values for name, values in _compared(histories).items() if len(set(values)) > 1}
    rows = {_short(name): list(map(page.cell, values)) for name, values in _sorted(differing)}
    body = page.table(["option", *histories], rows) if rows else page.note("All options are the same.")
    return [Section(title="Options that differ", body=body)]


def options(histories: Histories, /) -> Section:
    """The options that all runs have in common, in groups; those that are not as in the preset are marked."""
    same = {name: values[0] for name, values in _compared(histories).items() if len(set(values)) == 1}
    usual = _usual(next(iter(histories.values())).config)
    tables: dict[str, dict[str, list[str]]] = {title: {} for title in (*_GROUPS, "Run")}
    for name, value in _sorted(same):
        title = next((title for title, begins in _GROUPS.items() if name.startswith(begins)), "Run")
        changed = name in usual and usual[name] != value
        text = f"{value} (preset: {usual[name]})" if changed else value
        tables[title][_short(name)] = [page.cell(text, "changed" if changed else "")]
    body = page.groups({title: page.table(["option", "value"], rows) for title, rows in tables.items() if rows})
    if len(histories) == 1:
        return Section(title="Options", body=body)
    return Section(title="Options that are the same", body=page.folded(f"{len(same)} options", body))


_GROUPS: Mapping[str, str | tuple[str, ...]] = {
    "Network": "network.",
    "Training": "hyper.",
    "Data": ("data", "condition", "flip", "holdout", "skip_broken"),
}


def _compared(histories: Histories) -> dict[str, list[str]]:
    """Each option's values in all runs."""
    flat = [_flat(history.config) for history in histories.values()]
    names = dict.fromkeys(name for one in flat for name in one)
    return {name: [one.get(name, "") for one in flat] for name in names}


def _usual(config: TrainConfig) -> dict[str, str]:
    """The options of network and training that the config's preset has; none of a preset that is not fixed."""
    if config.preset not in PRESETS:
        return {}
    made = PRESETS[config.preset]
    usual = _flat(replace(config, network=made.network, hyper=made.hyper, snapshot_plan=None))
    return {name: text for name, text in usual.items() if name.startswith(("network.", "hyper."))}


def _flat(config: TrainConfig) -> dict[str, str]:
    """Every option as text, by its path."""
    return dict(_paths(asdict(config)))


def _sorted(options: Mapping[str, _T]) -> list[tuple[str, _T]]:
    return sorted(options.items(), key=lambda item: _short(item[0]).lower())


def _short(name: str) -> str:
    """Without its group, which stands above."""
    return name.removeprefix("network.").removeprefix("hyper.").removeprefix("switches.")


def _paths(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _values(lines: Lines) -> str:
    """The values of lines that stay as they are."""
    values = sorted({f"{np.nanmean(line.y):.3g}" for line in lines.lines if np.isfinite(line.y).any()}, key=float)
    return " to ".join(dict.fromkeys((values[0], values[-1]))) if values else "nothing"


def _ends(curves: Mapping[str, Curve]) -> str:
    return "; ".join(f"{name}: from {curve.mean[0]:.3g} to {curve.mean[-1]:.3g}" for name, curve in curves.items())


def _unmeasured(histories: Histories) -> str:
    return _notes(
        f"{name} has no telemetry: train with --telemetry 50 for example, which measures every 50th step."
        for name, history in histories.items()
        if history.telemetry is None
    )


def _notes(texts: "Sequence[str] | Iterator[str]") -> str:
    return "".join(map(page.note, texts))
