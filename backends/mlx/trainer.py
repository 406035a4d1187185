"""The trainer that the training loop drives: a network in training on this process's device, with noise of its own."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from backends.pipeline.runs.config import TrainConfig
from backends.ports import Machine, Measurement, Trainer
from edm2_core.ema import Length
from edm2_core.loss import noise_level
from edm2_core.network import initialize
from edm2_core.state import Arrays, State

from . import device as devices
from .step import Batch, Learner, Metrics
from .telemetry import measured_step
from .weights import build, dump, tensors, to_native


class MLXTrainer(Trainer):
    """See :class:`backends.ports.Trainer`. MLX's default device becomes the machine's.

    Raises:
        InputError: no such device, or another process does not answer.
    """

    def __init__(self, config: TrainConfig, machine: Machine):
        super().__init__()
        device = devices.choose(machine.device)
        mx.set_default_device(device)
        self._processes = devices.Processes.here()
        self.rank, self.world = self._processes.rank, self._processes.world
        self.device = devices.describe(device)
        self._config, self._microbatch, hyper = config, machine.batch_per_device, config.hyper
        params = initialize(config.network, seed=config.seed)
        self.learner = Learner(
            build(config.network, params, dtype=devices.arithmetic(config.precision)),
            **hyper.of_step,
            microbatch=machine.batch_per_device,
            processes=self._processes,
        )

    @property
    def nimg(self) -> int:
        return self.learner.nimg

    def take_step(self, images: np.ndarray, labels: np.ndarray | None, *, lr: float) -> Metrics:
        batch, dropout = self._batch(images, labels)
        return self.learner.step(batch, lr=lr, dropout=dropout)

    def take_measured_step(
        self, images: np.ndarray, labels: np.ndarray | None, *, lr: float
    ) -> tuple[Metrics, Measurement]:
        batch, dropout = self._batch(images, labels)
        return measured_step(self.learner, batch, lr=lr, dropout=dropout)

    def _batch(self, images: np.ndarray, labels: np.ndarray | None) -> tuple[Batch, mx.array | None]:
        """A batch with noise, and the dropout key. Noise is drawn for the whole batch and cut to this process's share:
        it does not depend on the number of processes."""
        hyper, share = self._config.hyper, slice(self.rank * len(images), (self.rank + 1) * len(images))
        (seed,) = np.random.SeedSequence([self._config.seed, self.nimg]).generate_state(1, np.uint64)
        of_sigma, of_noise, of_dropout = mx.random.split(mx.random.key(int(seed)), 3)
        pixels = to_native(images)
        noise = mx.random.normal((hyper.batch, *pixels.shape[1:]), key=of_noise)
        normal = mx.random.normal((hyper.batch, 1, 1, 1), key=of_sigma)
        sigma = noise_level(normal, P_mean=hyper.P_mean, P_std=hyper.P_std)
        one_hot = None if labels is None else to_native(labels)
        # each process drops different activations
        dropout = mx.random.split(of_dropout, self.world)[self.rank] if self._config.network.dropout else None
        return Batch(pixels, noise[share], sigma[share], one_hot), dropout

    def fetch(self, values: Sequence[mx.array], /) -> np.ndarray:
        return np.array(mx.stack(list(values)))

    def mean_over_processes(self, value: float, /) -> float:
        return self._processes.mean(value)

    def is_out_of_memory(self, error: Exception, /) -> bool:
        return isinstance(error, RuntimeError) and "allocate" in str(error)

    def images_at_a_time(self, count: int, /) -> int:
        return self._microbatch or count

    def parameters(self) -> Arrays:
        return dump(tensors(self.learner.network))

    def average(self, length: Length, /) -> Arrays:
        return dump(self.learner.ema.arrays(length))

    def state(self) -> State:
        return self.learner.state()

    def load_state(self, state: State, /) -> None:
        self.learner.load_state(state)
