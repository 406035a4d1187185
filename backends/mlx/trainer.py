"""The trainer that the training loop drives: a network in training on this process's device, with noise of its own."""

from collections.abc import Collection, Sequence

import mlx.core as mx
import numpy as np

from backends.pipeline.data import batches as data
from backends.pipeline.runs.config import TrainConfig
from backends.ports import Machine
from backends.trainer import Measurement, Trainer
from edm2_core import loss as objective
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.loss import noise_level
from edm2_core.network import initialize
from edm2_core.state import Arrays, State

from . import device as devices
from .step import Batch, Learner, Metrics
from .telemetry import measured_step
from .weights import build, dump, tensors, to_native


class MLXTrainer(Trainer):
    """See :class:`backends.trainer.Trainer`. MLX's default device becomes the machine's.

    Raises:
        InputError: no such device, or another process does not answer.
    """

    def __init__(self, config: TrainConfig, machine: Machine):
        super().__init__()
        device = devices.choose(machine.device)
        mx.set_default_device(device)
        self._processes = devices.Processes.here()
        self.rank, self.world = self._processes.rank, self._processes.world
        self.team = self._processes.team()
        self.device = devices.describe(device)
        if machine.shard and self.world > 1:
            raise InputError("weights in MLX are whole in each process, got --shard: leave it out, or train with JAX")
        self._config, self._microbatch, hyper = config, machine.batch_per_device, config.hyper
        params = initialize(config.network, seed=config.seed)
        network = build(config.network, params, dtype=devices.arithmetic(config.precision))
        network.unet.recomputes = machine.activation_checkpoint
        self.learner = Learner(
            network,
            **hyper.of_step,
            microbatch=machine.batch_per_device,
            processes=self._processes,
            frozen=config.frozen,
        )

    @property
    def nimg(self) -> int:
        return self.learner.nimg

    def place(self, batch: data.Batch, /) -> data.Batch:
        def native(array: np.ndarray | None) -> mx.array | None:
            if array is None:
                return None
            return mx.array(np.ascontiguousarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array))

        return data.Batch(*map(native, batch))

    def take_evaluation(self, batch: data.Batch, unit_noise: np.ndarray, sigma: np.ndarray, /) -> np.ndarray:
        images, labels, condition = self._prepared(batch)
        noise, level = to_native(unit_noise), mx.array(sigma.reshape(-1, 1, 1, 1))
        losses = []
        for part in Batch(images, noise, level, labels, condition).split(self._microbatch):
            noisy = part.images + part.unit_noise * part.sigma
            denoised, _ = self.learner.network(noisy, part.sigma, part.labels, part.condition)
            weight = objective.weight(part.sigma, sigma_data=self._config.network.sigma_data)
            losses.append((weight * (denoised - part.images).square()).mean(axis=(1, 2, 3)))
            mx.eval(losses)
        return np.array(mx.concatenate(losses))

    def take_step(self, batch: data.Batch, *, lr: float) -> Metrics:
        noisy, dropout = self._batch(batch)
        return self.learner.step(noisy, lr=lr, dropout=dropout)

    def take_measured_step(self, batch: data.Batch, *, lr: float) -> tuple[Metrics, Measurement]:
        noisy, dropout = self._batch(batch)
        return measured_step(self.learner, noisy, lr=lr, dropout=dropout)

    def _prepared(
        self, batch: data.Batch, latent: mx.array | None = None
    ) -> tuple[mx.array, mx.array | None, mx.array | None]:
        label_dim = self._config.network.label_dim
        return data.prepared(batch, self._config.format, label_dim=label_dim, channels=3, width=2, normal=latent)

    def _batch(self, batch: data.Batch) -> tuple[Batch, mx.array | None]:
        """A batch with noise, and keys of dropout. They are drawn for the whole batch and cut to this process's share:
        they do not depend on the number of processes."""
        config, hyper, count = self._config, self._config.hyper, len(batch.images)
        share = slice(self.rank * count, (self.rank + 1) * count)
        seed, of_latents = np.random.SeedSequence([config.seed, self.nimg]).generate_state(2, np.uint64)
        of_sigma, of_noise, of_dropout = mx.random.split(mx.random.key(int(seed)), 3)
        shape = (hyper.batch, *config.network.image_size, config.network.img_channels)
        moments = config.format.codec.stored == "moments"
        latent = mx.random.normal(shape, key=mx.random.key(int(of_latents)))[share] if moments else None
        pixels, labels, condition = self._prepared(batch, latent)
        noise = mx.random.normal(shape, key=of_noise)
        normal = mx.random.normal((hyper.batch, 1, 1, 1), key=of_sigma)
        sigma = noise_level(normal, P_mean=hyper.P_mean, P_std=hyper.P_std)
        dropout = mx.random.split(of_dropout, hyper.batch)[share] if self._config.network.dropout else None
        return Batch(pixels, noise[share], sigma[share], labels, condition), dropout

    def fetch(self, values: Sequence[mx.array], /) -> np.ndarray:
        return np.array(mx.stack(list(values)))

    def mean_over_processes(self, value: float, /) -> float:
        return self._processes.mean(value)

    def is_out_of_memory(self, error: Exception, /) -> bool:
        return isinstance(error, RuntimeError) and "allocate" in str(error)

    def images_at_a_time(self, count: int, /) -> int:
        return self._microbatch or count

    def parameters(self, names: Collection[str] | None = None, /) -> Arrays:
        return dump(tensors(self.learner.network), names)

    def average(self, length: Length, names: Collection[str] | None = None, /) -> Arrays:
        return dump(self.learner.ema.arrays(length), names)

    def state(self, names: Collection[str] | None = None, /) -> State:
        return self.learner.state(names)

    def state_alone(self, error: Exception, /) -> State | None:
        return None if self.learner.updating else self.learner.state()

    def load_state(self, state: State, /) -> None:
        self.learner.load_state(state)
