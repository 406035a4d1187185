"""Metrics of a run's averages while it trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.data.datasets import Dataset
from backends.pipeline.metrics.figures import Metric
from backends.ports import OpenSampler
from backends.trainer import Trainer
from edm2_core.ema import Length
from edm2_core.errors import InputError

from . import outputs
from .config import TrainConfig
from .evaluation import BATCH, FIGURES, Measure, append_figures, read_figures
from .folder import Run
from .job import Conditions, Job, batches, labels_of_seeds
from .options import ScoreOptions
from .trackers import Trackers


class Measured(NamedTuple):
    """Whose averages are measured, against what, and the name of the device."""

    config: TrainConfig
    dataset: Dataset
    trainer: Trainer
    device: str | None


class Scores:
    """Measures the averages that a trainer tracks. All processes must make and call it together."""

    def __init__(
        self,
        options: ScoreOptions,
        measured: Measured,
        open_sampler: OpenSampler,
        *,
        run: Run | None,
        say: Callable[[str], None],
        trackers: Trackers,
    ) -> None:
        config, dataset, trainer, device = measured
        if config.format.codec.stored != "uint8":
            raise InputError(
                f"--evaluate measures 8-bit images, got {config.format.codec.stored} data: measure snapshots with "
                "edm2 evaluate and --vae"
            )
        self._options, self._config, self._dataset, self._open = options, config, dataset, open_sampler
        self._trainer, self._run, self._say, self._trackers = trainer, run, say, trackers
        self._measure = Measure.of([options.evaluate_metric], reference=dataset.spec, device=device, team=trainer.team)
        self._best: tuple[float, str] | None = None
        for line in read_figures(run.path / FIGURES) if run is not None else ():
            if line.get("training") and line["metric"] == options.evaluate_metric and line["nimg"] <= trainer.nimg:
                self._note(line["figures"][self._metric.main], str(line["length"]), line["nimg"])

    @property
    def _metric(self) -> Metric:
        (metric,) = self._measure.metrics
        return metric

    def __call__(self, nimg: int) -> None:
        """Measure each average, write the figures to the run, send them to its trackers, and say them and the best so
        far."""
        lines = []
        for length in self._config.hyper.lengths:
            lines.append(self._of(length, nimg))
            value = lines[-1]["figures"][self._metric.main]
            self._note(value, str(length), nimg)
            assert self._best is not None
            name = f"sigma_rel {length}" if length.relative else str(length)
            self._say(f"{self._metric.name} {value:.4g} by {name}; best so far {self._best[1]}")
        self._trackers.figures(lines)

    def _of(self, length: Length, nimg: int) -> dict[str, Any]:
        """The line of figures.jsonl of one average."""
        config = self._config.network
        snapshot = Snapshot(
            params=self._trainer.average(length), config=config, nimg=nimg, length=length, data=self._config.format
        )
        seeds, given = range(self._options.evaluate_images), Conditions(self._dataset)
        vectors = config.label_dim and self._dataset.vectors
        job = Job(
            snapshot=snapshot,
            seeds=seeds,
            labels=given.labels(seeds) if vectors else labels_of_seeds(seeds, config),
            conditions=given if config.cond_channels else None,
            solver={"num_steps": self._options.evaluate_steps},
        )
        finish = outputs.finish("png", job.format, None)
        images = batches(job, self._open, batch=BATCH, team=self._trainer.team, finish=finish)
        made = self._measure.statistics(one.images for one in images)
        (line,) = self._measure.figures(made)
        known = {"training": True, "nimg": nimg, "length": length.value, "steps": self._options.evaluate_steps}
        if self._run is not None:
            append_figures(self._run.path / FIGURES, [line | known])
        return line | known

    def _note(self, value: float, length: str, nimg: int) -> None:
        if self._best is None or self._metric.loss(value) < self._best[0]:
            self._best = self._metric.loss(value), f"{value:.4g} by {length} at {nimg} images"
