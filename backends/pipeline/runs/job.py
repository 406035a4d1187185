"""What is to be sampled, and the samples, batch by batch.

Noise and labels are drawn on the host, so a seed gives the same image in every port and in any batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np

from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.data.datasets import Dataset, open_dataset
from backends.pipeline.data.labels import one_hot
from backends.pipeline.data.seeds import churn_noise, noise, torch_labels, torch_noise
from backends.pipeline.data.seeds import labels as seeded_labels
from backends.ports import Network, OpenSampler
from edm2_core.codec import PIXELS, DataFormat
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from . import freed_memory
from .folder import Run
from .outputs import Finish
from .pictures import visible
from .progress import Progress
from .team import Team

Noise = Literal["edm2", "torch"]
"""How a seed's noise and label are drawn: by this library's streams, or as the official tools draw them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that determines the images.

    ``labels``: class ids, int64 [number of seeds], -1 without labels; or label vectors, float32 [number of seeds,
    label_dim]. ``conditions``: of seeds, those of the images, as the network sees them. ``solver``: options of
    :func:`edm2_core.sampler.sample`, and ``guide_interval``.
    """

    snapshot: Snapshot
    guide: Network | None = None
    guidance: float = 1.0
    seeds: Sequence[int]
    labels: np.ndarray
    conditions: "Conditions | None" = None
    solver: Mapping[str, Any] = field(default_factory=dict)
    noise: Noise = "edm2"

    @property
    def format(self) -> DataFormat:
        """What the samples are; 8-bit images where the snapshot does not say."""
        return self.snapshot.data or DataFormat()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        config = self.snapshot.required_config()
        return (config.img_channels, *config.image_size)


@dataclass(frozen=True)
class Conditions:
    """The conditions of seeds, or their label vectors: seed s has those of sample s, modulo their number."""

    dataset: Dataset

    def __call__(self, seeds: Sequence[int], /) -> np.ndarray:
        """The conditions, float32 [n, channels, height, width]."""
        codec = self.dataset.format.condition or PIXELS
        return codec.encode(self.dataset.condition(self._indices(seeds)))

    def labels(self, seeds: Sequence[int], /) -> np.ndarray:
        """The label vectors, float32 [n, label_dim]."""
        return self.dataset.labels(self._indices(seeds))

    def _indices(self, seeds: Sequence[int]) -> np.ndarray:
        return np.array([seed % len(self.dataset) for seed in seeds], np.int64)


def job_of_run(snapshot: Snapshot, run: Run, *, seeds: Sequence[int], solver: Mapping[str, Any]) -> Job:
    """The samples of ``seeds`` by an average of a run, with the conditions and label vectors of its data.

    Raises:
        InputError: the data are not where the run had them.
    """
    given, config = given_with(snapshot, run), snapshot.required_config()
    vectors = given is not None and config.label_dim > 0 and given.dataset.vectors
    labels = given.labels(seeds) if given and vectors else labels_of_seeds(seeds, config)
    conditions = given if config.cond_channels else None
    return Job(snapshot=snapshot, seeds=seeds, labels=labels, conditions=conditions, solver=solver)


def given_with(
    snapshot: Snapshot, run: Run | None, *, data: str | None = None, condition: str | None = None
) -> Conditions | None:
    """The conditions and label vectors at these paths, by default the run's; None for a network that takes neither."""
    config, settings = snapshot.required_config(), None if run is None else run.config()
    summary = settings.data_summary if settings is not None else None
    vectors = summary is not None and summary.vectors
    if not config.cond_channels and not (data or (vectors and config.label_dim)):
        return None
    if settings is not None:
        condition = condition or settings.condition
    if config.cond_channels and condition is None:
        raise InputError("a network with conditions needs --condition, got none: name images or arrays")
    if config.cond_channels and not (data or vectors):
        path = condition  # only the conditions are needed
    else:
        path = data or (settings.data if settings is not None else None)
    dataset = open_dataset(str(path), condition=condition if config.cond_channels else None, format=snapshot.data)
    need = (config.cond_channels, *(config.image_size if config.cond_channels else dataset.shape[1:]))
    if (got := (dataset.cond_channels, *dataset.shape[1:])) != need:
        raise InputError(f"--condition must be of shape {need}, got {got} in {condition}: make it fit the network")
    if vectors and dataset.label_dim != config.label_dim:
        raise InputError(f"--data must have label vectors of {config.label_dim}, got {dataset.label_dim} in {path}")
    return Conditions(dataset)


def labels_of_seeds(seeds: Sequence[int], config: NetworkConfig, noise: Noise = "edm2", /) -> np.ndarray:
    """The class ids drawn from seeds, int64 [n]; -1 without labels. They are the ``labels`` of a :class:`Job`."""
    if not config.label_dim:
        return np.full(len(seeds), -1, np.int64)
    if noise == "torch":
        return torch_labels(seeds, (config.img_channels, *config.image_size), config.label_dim)
    return seeded_labels(seeds, config.label_dim)


@dataclass(frozen=True)
class Made:
    """A batch of samples: their places among the job's seeds, and what was made of them."""

    part: slice
    images: np.ndarray


def batches(
    job: Job,
    open_sampler: OpenSampler,
    *,
    batch: int,
    team: Team = Team(),
    shown: bool = False,
    finish: Finish | None = None,
    skip: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[Made]:
    """The samples of this process's batches, one after another: batch i is made by process i modulo their number.

    ``finish`` makes an output of float32 samples of the network; None: pictures, uint8 with 1 or 3 channels. Batches
    for whose seeds ``skip`` is true are not made.
    """
    freed_memory.keep()
    config, shape = job.snapshot.required_config(), job.shape
    draw = torch_noise if job.noise == "torch" else noise
    sampler = open_sampler(config, job.snapshot.params, guide=job.guide)
    parts = [slice(start, min(start + batch, len(job.seeds))) for start in range(0, len(job.seeds), batch)]
    parts = parts[team.rank :: team.world]
    with Progress(total=sum(part.stop - part.start for part in parts), shown=shown and team.rank == 0) as progress:
        for part in parts:
            seeds, labels = job.seeds[part], job.labels[part]
            if skip is None or not skip(seeds):
                rows = labels if labels.ndim == 2 else one_hot(labels, config.label_dim) if config.label_dim else None
                given: dict[str, Any] = {} if job.conditions is None else {"condition": job.conditions(seeds)}
                churn = (churn_noise(seeds, shape, step=step) for step in count())
                options = {**job.solver, **given, "guidance": job.guidance, "churn_noise": churn}
                samples = sampler(draw(seeds, shape), rows, **options)
                yield Made(part, visible(samples, job.format) if finish is None else finish(samples))
            progress.advance(len(seeds))
            progress.report()


def sample_images(job: Job, open_sampler: OpenSampler, *, batch: int, finish: Finish | None = None) -> np.ndarray:
    """All samples of :func:`batches` in one array, [n, channels, height, width], one per seed."""
    return np.concatenate([made.images for made in batches(job, open_sampler, batch=batch, finish=finish)])
