"""What the training loop drives: a network in training on this process's device, with noise of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from backends.pipeline.checkpoints.states import State
from backends.pipeline.runs.config import Settings
from backends.pipeline.runs.options import TrainOptions
from backends.pipeline.runs.telemetry import Measurement
from edm2_core.errors import InputError
from edm2_core.loss import noise_level
from edm2_core.network import initialize

from . import device as devices
from .step import Batch, Training
from .telemetry import measured
from .weights import build, dump, tensors, to_nhwc


class MLXTrainer:
    """A trainer: draws noise on the device, a function of (seed, images seen)."""

    def __init__(self, settings: Settings, options: TrainOptions):
        device = devices.choose(options.device)
        mx.set_default_device(device)
        self._processes = devices.Processes.here()
        self.rank, self.world = self._processes.rank, self._processes.world
        self.device = devices.describe(device)
        self._settings, self._microbatch = settings, options.batch_per_device
        self.training = Training(
            build(
                settings.network,
                initialize(settings.network, seed=settings.seed),
                dtype=devices.arithmetic(settings.precision),
            ),
            betas=settings.betas,
            sigma_rels=settings.lengths,
            loss_scaling=settings.loss_scaling,
            microbatch=options.batch_per_device,
            processes=self._processes,
        )
        self._metrics: list[tuple[float, int]] = []

    def step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> None:
        batch, dropout = self._batch(images, labels, nimg)
        with self._memory(len(images)):
            self._keep(self.training.step(batch, lr=lr, dropout=dropout))

    def measured_step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> Measurement:
        batch, dropout = self._batch(images, labels, nimg)
        with self._memory(len(images)):
            metrics, found = measured(self.training, batch, lr=lr, dropout=dropout)
            self._keep(metrics)
        return found

    def _keep(self, metrics: tuple[mx.array, mx.array]) -> None:
        self._metrics.append((float(metrics[0]), int(metrics[1])))

    @contextmanager
    def _memory(self, count: int) -> Iterator[None]:
        """Raise InputError, with the batch to try, where memory runs out."""
        try:
            yield
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            half = max((self._microbatch or count) // 2, 1)
            raise InputError(
                f"the step must fit into memory, got none left on {self.device}: try --batch-per-device {half}"
            ) from error

    def _batch(self, images: np.ndarray, labels: np.ndarray | None, nimg: int) -> tuple[Batch, mx.array | None]:
        """Noise is drawn for the whole batch and cut to this process's share, so their number changes nothing."""
        settings, share = self._settings, slice(self.rank * len(images), (self.rank + 1) * len(images))
        (seed,) = np.random.SeedSequence([settings.seed, nimg]).generate_state(1, np.uint64)
        of_sigma, of_noise, of_dropout = mx.random.split(mx.random.key(int(seed)), 3)
        normal = mx.random.normal((settings.batch, 1, 1, 1), key=of_sigma)
        pixels = to_nhwc(images)
        noise = mx.random.normal((settings.batch, *pixels.shape[1:]), key=of_noise)
        sigma = noise_level(normal, P_mean=settings.P_mean, P_std=settings.P_std)
        classes = None if labels is None else mx.array(labels)
        # what one process drops another does not
        dropout = mx.random.split(of_dropout, self.world)[self.rank] if settings.network.dropout else None
        return Batch(pixels, noise[share], sigma[share], classes), dropout

    def metrics(self) -> Mapping[str, float]:
        losses, nonfinite = zip(*self._metrics, strict=True)
        self._metrics = []
        return {"loss": self._processes.mean(float(np.mean(losses))), "nonfinite": sum(nonfinite)}

    def parameters(self) -> Mapping[str, np.ndarray]:
        return dump(tensors(self.training.network))

    def averages(self) -> Mapping[float, Mapping[str, np.ndarray]]:
        ema = self.training.ema
        return {sigma_rel: dump(ema.arrays(sigma_rel)) for sigma_rel in ema.averages}

    def state(self) -> State:
        return self.training.state()

    def load_state(self, state: State, /) -> None:
        self.training.load_state(state)

    def agree(self, stop: bool, /) -> bool:
        return self._processes.mean(float(stop)) > 0
