"""edm2 evaluate: FID, FD-DINOv2 and other metrics of a network's images, or of stored ones.

Images of a network are measured as they are made and never stored. Several processes, started by torchrun for example,
divide the seeds; the figures are the same.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from backends.pipeline.metrics import statistics
from backends.pipeline.metrics.figures import Metric, warnings
from backends.pipeline.runs.command_line import parse_seeds
from backends.pipeline.runs.evaluation import (
    FIGURES,
    Measure,
    append_figures,
    described,
    generated,
    stored_images,
)
from backends.pipeline.runs.networks import FoundNetwork
from backends.pipeline.runs.options import SamplingOptions
from backends.pipeline.runs.sampling import job_of, network_of, with_preset
from backends.pipeline.runs.team import Team
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Options of ``edm2 evaluate``: those of sampling, and these."""

    metric: tuple[str, ...] = ("fid",)
    """fid, fd-dinov2, kid, is, precision-recall; or a kind and an extractor such as frechet@pixels or
    kernel@my_module:my_function."""
    reference: str | None = None
    """Data, or a file of statistics (.npz, or an official .pkl). Without it: the data of the run."""
    images: str | None = None
    """Images to measure instead of a network's: a folder, .zip or .npz."""
    seeds: str = "0-49999"
    """Seeds, one image for each; of stored images, their number is how many are measured."""
    weights: str | None = None
    """Weights of the extractor. Without it: the published ones, which are downloaded."""
    save: Path | None = None
    """File for the statistics of the images (.npz), as a reference for other images; of one extractor."""
    port: Literal["torch", "jax", "mlx"] = "torch"
    """Port that samples."""


def run(options: Options) -> None:
    """Print the figures; those of a run are also added to its figures.jsonl.

    Raises:
        InputError: as :class:`~backends.pipeline.runs.evaluation.Measure`, and as sampling.
    """
    _check(options)
    port = import_module(f"backends.{options.port}.sample")
    team: Team = port.open_team(options.device)
    say = team.say
    found = job = None
    if options.images is None:
        options = with_preset(options, say)
        found = network_of(options, train=f"python -m backends.{options.port}.train")
        job = job_of(options, found)
        say(f"network    {found.origin}")
    reference = options.reference or _data_of(found)
    if reference is None and options.save is None:  # known before anything is measured
        for metric in map(Metric.called, options.metric):
            metric.check_reference(None)
    measure = Measure.of(options.metric, reference=reference, weights=options.weights, device=options.device, team=team)
    if job is None:
        made = measure.statistics(stored_images(str(options.images), team, len(parse_seeds(options.seeds))))
    else:
        made = measure.statistics(generated(options, job, port, team))
    if options.save is not None:
        if team.rank == 0:
            statistics.save(options.save, next(iter(made.values())))
        say(f"wrote      {options.save}")
        if reference is None:
            return
    records = measure.figures(made)
    for line in records:
        for name, value in line["figures"].items():
            say(f"{name:10} {value:.6g}  ({line['count']} images, {line['extractor']}{_hash(line['weights'])})")
    for metric in measure.metrics:
        for text in warnings(metric, made[metric.extractor]):
            say(f"note       {text}")
    if job is not None and found is not None and found.run is not None and team.rank == 0:
        known = described(options, job, reference)
        append_figures(found.run.notes_path / FIGURES, [line | known for line in records])


def _check(options: Options) -> None:
    extractors = sorted({Metric.called(name).extractor for name in options.metric})
    if options.save is not None and len(extractors) != 1:
        raise InputError(f"--save keeps statistics of one extractor, got {', '.join(extractors)}: ask for one metric")


def _data_of(found: FoundNetwork | None) -> str | None:
    return found.run.config().data if found is not None and found.run is not None else None


def _hash(weights: str) -> str:
    return f", weights {weights[:8]}" if weights else ""
