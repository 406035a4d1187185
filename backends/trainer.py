"""What the training loop drives: the base class of every port's trainer, and what all trainers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.pipeline.runs.team import Team
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.state import Arrays, State

from .ports import Machine


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Telemetry of one training step.

    By name of the weight, each [2]: maximum and mean magnitude over features of ``activations``, ``weights`` and
    ``gradients``; in ``updates``, the norm of the change of the weight and that of the weight. An activation is the
    output of a layer, bias and gain included, before any nonlinearity; its magnitude is the root mean square over the
    pixels of a feature in one image. The magnitude of a weight, as it is after forcing, or of a gradient, as Adam
    receives it (summed over processes, without loss scaling, zeroed by SPEC STEP-2), is the root mean square of a row.

    By image, each [N]: ``sigma``; ``loss``, lambda(sigma) times the mean square error; ``u``, the learned uncertainty,
    or None. Each process measures its own images. Activations and losses are without dropout.
    """

    activations: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    updates: Mapping[str, np.ndarray]
    sigma: np.ndarray
    loss: np.ndarray
    u: np.ndarray | None


class Trainer(ABC):
    """A network in training, in one of ``world`` processes. All processes must make the same calls in the same order.

    A port defines the abstract methods and sets ``rank``, ``world``, ``team`` and ``device`` (a description). Noise is
    drawn on the device as a function of (seed, images seen), independent of the number of processes. Batches are those
    that :meth:`place` made of this process's share.
    """

    rank: int = 0
    world: int = 1
    team: Team = Team()
    device: str
    measures: bool = True
    """Whether it can measure steps; where it cannot, none is."""

    def __init__(self) -> None:
        self._metrics: list[tuple[Any, Any]] = []
        self._images = 1  # of this process's last share
        self.zeroed_in_a_row = 0
        """The number of steps in a row, up to the last call of :meth:`metrics`, with zeroed gradient elements."""

    @property
    @abstractmethod
    def nimg(self) -> int:
        """Images seen since the start of the run: the clock of the training loop, which has no other."""

    def step(self, batch: Any, /, *, lr: float) -> None:
        """Train on this process's share of a batch. Raises InputError if the memory of the device is exhausted."""
        self._images = len(batch.images)
        with self._memory(self._images):
            self._metrics.append(self.take_step(batch, lr=lr))

    def measured_step(self, batch: Any, /, *, lr: float) -> Measurement:
        """:meth:`step`, and its telemetry. Training continues exactly as if nothing were measured."""
        self._images = len(batch.images)
        with self._memory(self._images):
            metrics, measurement = self.take_measured_step(batch, lr=lr)
            self._metrics.append(metrics)
        return measurement

    def evaluate(self, batch: Any, unit_noise: np.ndarray, sigma: np.ndarray, /) -> np.ndarray:
        """lambda(sigma) times the mean square error of each image of this process's share, float [n], by the current
        weights without dropout. ``unit_noise``: float32 [n, C, H, W]; ``sigma``: float32 [n]."""
        with self._memory(len(batch.images)):
            return self.take_evaluation(batch, unit_noise, sigma)

    def metrics(self) -> dict[str, float]:
        """Since the last call: ``loss``, the mean over steps and processes, and ``nonfinite``, the number of gradient
        elements that were zeroed."""
        with self._memory(self._images):  # some devices say at the end of a step that it did not fit
            losses, nonfinite = (self.fetch(values) for values in zip(*self._metrics, strict=True))
        self._metrics = []
        for count in nonfinite:
            self.zeroed_in_a_row = self.zeroed_in_a_row + 1 if count else 0
        return {"loss": self.mean_over_processes(float(losses.mean())), "nonfinite": int(nonfinite.sum())}

    def settle(self) -> None:
        """Wait for the device to end the last step."""
        if self._metrics:
            with self._memory(self._images):
                self.fetch(self._metrics[-1])

    def agree(self, stop: bool, /) -> bool:
        """Whether ``stop`` is true in any process."""
        return stop if self.world == 1 else self.mean_over_processes(float(stop)) > 0

    @contextmanager
    def _memory(self, count: int) -> Iterator[None]:
        """Context manager that turns exhausted memory into an InputError which names a smaller batch."""
        try:
            yield
        except Exception as error:
            if not self.is_out_of_memory(error):
                raise
            half = max(self.images_at_a_time(count) // 2, 1)
            raise InputError(
                f"the step must fit into memory, got none left on {self.device}: try --batch-per-device {half}"
            ) from error

    @abstractmethod
    def place(self, batch: Any, /) -> Any:
        """A :class:`~backends.pipeline.data.batches.Batch` of NumPy arrays as one on the device, with ``images``, which
        the other methods take. Called in a thread of its own while a step runs."""

    @abstractmethod
    def take_evaluation(self, batch: Any, unit_noise: np.ndarray, sigma: np.ndarray, /) -> np.ndarray:
        """:meth:`evaluate`."""

    @abstractmethod
    def take_step(self, batch: Any, *, lr: float) -> tuple[Any, Any]:
        """Take a step; returns mean loss per element and number of zeroed gradient elements, 0-d on the device."""

    @abstractmethod
    def take_measured_step(self, batch: Any, *, lr: float) -> tuple[tuple[Any, Any], Measurement]:
        """:meth:`take_step`, and its telemetry."""

    @abstractmethod
    def fetch(self, values: Sequence[Any], /) -> np.ndarray:
        """Scalars of the device as one NumPy array."""

    @abstractmethod
    def mean_over_processes(self, value: float, /) -> float: ...

    @abstractmethod
    def is_out_of_memory(self, error: Exception, /) -> bool: ...

    @abstractmethod
    def images_at_a_time(self, count: int, /) -> int:
        """How many images a device processes at once when this process has ``count``."""

    def for_first(self, get: Callable[[Collection[str]], Arrays], names: Iterable[str], /) -> Arrays:
        """What ``get`` returns of all ``names``, in the first process, and nothing in the others, which help to gather
        one array after another and keep none."""
        if self.world == 1:
            return get(list(names))
        kept: dict[str, np.ndarray] = {}
        for name in names:
            part = get([name])
            if self.rank == 0:
                kept.update(part)
        return kept

    @abstractmethod
    def parameters(self, names: Collection[str] | None = None, /) -> Arrays:
        """The current weights and constants ``names``, or all, canonical, in every process."""

    @abstractmethod
    def average(self, length: Length, names: Collection[str] | None = None, /) -> Arrays:
        """The arrays ``names`` of one average, or all, canonical, in every process; nothing else is gathered."""

    @abstractmethod
    def state(self, names: Collection[str] | None = None, /) -> State:
        """The arrays of the parameters ``names``, or of all, as copies on the host: nothing else is gathered."""

    @abstractmethod
    def state_alone(self, error: Exception, /) -> State | None:
        """The whole state after the last complete step, from this process alone, in which ``error`` ended a step or a
        message. None: others hold parts of it, or the step failed while it was changing it."""

    @abstractmethod
    def load_state(self, state: State, /) -> None:
        """Continue from ``state``, written by any port."""


OpenTrainer = Callable[[Any, Machine], Trainer]
"""(:class:`~backends.pipeline.runs.config.TrainConfig`, machine) -> trainer."""
