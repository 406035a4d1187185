"""Which of several runs is better, measure by measure, and whether the difference is more than chance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backends.pipeline.metrics.figures import Metric
from backends.pipeline.runs.evaluation import FIGURES, read_figures

from . import page
from .history import History
from .page import Section

_LAST, _LAST_MEASURED = 0.9, 0.75  # of the images that all have seen: means are over what follows, of telemetry too


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, nan where that is unknown."""

    value: float
    error: float = np.nan

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate | None":
        """The mean of what is finite; None of nothing."""
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
        return cls(float(values.mean()), spread)

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if np.isnan(self.error) else f" ± {float(f'{self.error:.1g}'):g}")


@dataclass(frozen=True)
class Measure:
    """What all runs have been measured by. ``higher``: the highest value is the best."""

    name: str
    values: Mapping[str, Estimate]
    higher: bool = False

    def row(self, names: Sequence[str]) -> list[str]:
        """HTML: a value for each run, and the verdict."""
        ranked = sorted(names, key=lambda name: self.values[name].value, reverse=self.higher)
        best, second = (self.values[name] for name in ranked[:2])
        apart, chance = abs(best.value - second.value), np.hypot(*np.nan_to_num([best.error, second.error]))
        clear = apart > 2 * chance  # an error that is unknown counts as none
        won = ranked[0] if clear and apart > 0 else None
        cells = [page.cell(str(self.values[name]), "good" if name == won else "") for name in names]
        by = f"{apart / abs(second.value):.1%}" if second.value else f"{apart:.3g}"
        how = "the same" if apart == 0 else f"{ranked[0]}, by {by}" if clear else "no difference beyond chance"
        return [*cells, page.cell(how)]


def verdict(histories: Mapping[str, History], /) -> list[Section]:
    """A table of measures; no section for one run."""
    if len(histories) == 1:
        return []
    names = list(histories)
    rows = {measure.name: measure.row(names) for measure in _measures(histories) if measure.values.keys() >= set(names)}
    until = _until(histories)
    text = (
        f"Means over the last tenth of the {until:,.0f} images that all runs have seen (unweighted loss: "
        "the last quarter), with their standard errors. A difference of less than two of them is called chance. A run "
        "is one seed: another seed may differ by more."
    )
    body = page.table(["measure", *names, "better"], rows) if rows else page.note("The runs have no measure in common.")
    if len(_losses(histories)) > 1:
        body += page.note(
            "The training losses have different weights, so they are not compared: the unweighted loss is."
        )
    return [Section(title="Verdict", text=text, body=body)]


def _measures(histories: Mapping[str, History]) -> Iterator[Measure]:
    until = _until(histories)

    def logged(column: str) -> dict[str, Estimate]:
        found = {name: _last(h.log["nimg"], h.log[column], until) for name, h in histories.items()}
        return {name: value for name, value in found.items() if value is not None}

    if len(_losses(histories)) == 1:
        yield Measure("training loss", logged("loss"))
        yield Measure("held-out loss", logged("holdout"))
    measured = {name: h.telemetry for name, h in histories.items() if h.telemetry is not None}
    unweighted = {}
    for name, telemetry in measured.items():
        with np.errstate(all="ignore"):
            level = np.exp(np.nanmean(np.log(telemetry.loss), axis=1))
        if (value := _last(telemetry.nimg, level, until, since=_LAST_MEASURED)) is not None:
            unweighted[name] = value
    yield Measure("unweighted loss, geometric mean over noise levels", unweighted)
    yield Measure("images per second", logged("images_per_s"), higher=True)
    yield from _figures(histories)


def _figures(histories: Mapping[str, History]) -> Iterator[Measure]:
    """The best figure of each metric that was measured on as many images."""
    best: dict[tuple[str, str, object], dict[str, float]] = {}
    for name, history in histories.items():
        for line in read_figures(history.run.path / FIGURES):
            for figure, value in line["figures"].items():
                own = best.setdefault((line["metric"], figure, line.get("count")), {})
                loss = Metric.called(line["metric"]).loss
                own[name] = min(own.get(name, value), value, key=loss)
    for (metric, figure, count), values in best.items():
        higher = Metric.called(metric).loss(1.0) < 0
        yield Measure(f"{figure}, {count} images", {n: Estimate(v) for n, v in values.items()}, higher)


def _losses(histories: Mapping[str, History]) -> set[object]:
    """What the weights of the training loss follow from, of each run."""
    return {
        (h.config.hyper.P_mean, h.config.hyper.P_std, h.config.network.switches.uncertainty, h.config.data)
        for h in histories.values()
    }


def _until(histories: Mapping[str, History]) -> float:
    return min(float(history.log["nimg"].max(initial=0)) for history in histories.values())


def _last(nimg: np.ndarray, values: np.ndarray, until: float, *, since: float = _LAST) -> Estimate | None:
    return Estimate.of(values[(nimg > since * until) & (nimg <= until)])
