"""What the training loop drives: a network in training on this process's device, with noise of its own."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from backends.pipeline.checkpoints.states import State
from backends.pipeline.runs.config import Settings
from backends.pipeline.runs.options import TrainOptions
from backends.pipeline.runs.telemetry import Measurement
from edm2_core.loss import noise_level
from edm2_core.network import initialize

from . import device as devices
from .step import Batch, Training
from .telemetry import measured
from .weights import build, dump, tensors


class TorchTrainer:
    """A trainer: draws noise on the device, a function of (seed, images seen)."""

    def __init__(self, settings: Settings, options: TrainOptions):
        processes = devices.Processes.here()
        self.rank, self.world, self._processes = processes.rank, processes.world, processes
        self._device = devices.choose(options.device)
        processes.join(self._device)
        self.device = devices.describe(self._device)
        self._settings = settings
        network = build(
            settings.network,
            initialize(settings.network, seed=settings.seed),
            device=self._device,
            dtype=getattr(torch, settings.precision),
        )
        self.training = Training(
            network,
            betas=settings.betas,
            sigma_rels=settings.lengths,
            loss_scaling=settings.loss_scaling,
            microbatch=options.batch_per_device,
            world=processes.world,
        )
        self._losses: list[Tensor] = []
        self._nonfinite: list[Tensor] = []

    def step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> None:
        self._keep(self.training.step(self._batch(images, labels, nimg), lr=lr))

    def measured_step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> Measurement:
        metrics, found = measured(self.training, self._batch(images, labels, nimg), lr=lr)
        self._keep(metrics)
        return found

    def _keep(self, metrics: tuple[Tensor, Tensor]) -> None:
        self._losses.append(metrics[0])
        self._nonfinite.append(metrics[1])

    def _batch(self, images: np.ndarray, labels: np.ndarray | None, nimg: int) -> Batch:
        """Noise is drawn for the whole batch and cut to this process's share, so their number changes nothing."""
        settings, start, count = self._settings, self.rank * len(images), len(images)
        key = np.random.SeedSequence([settings.seed, nimg]).generate_state(2, np.uint64) >> np.uint64(1)
        generator = torch.Generator(self._device).manual_seed(int(key[0]))
        if settings.network.dropout:
            torch.manual_seed(int(key[1]) + self.rank)
        shape = (settings.batch, *images.shape[1:])
        normal = torch.randn((settings.batch, 1, 1, 1), generator=generator, device=self._device)
        noise = torch.randn(shape, generator=generator, device=self._device)
        sigma = noise_level(normal, P_mean=settings.P_mean, P_std=settings.P_std)
        share = slice(start, start + count)
        classes = None if labels is None else self._to_device(labels)
        return Batch(self._to_device(images), noise[share], sigma[share], classes)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def metrics(self) -> Mapping[str, float]:
        loss, nonfinite = torch.stack(self._losses).mean(), torch.stack(self._nonfinite).sum()
        if self.world > 1:
            torch.distributed.all_reduce(loss)
        self._losses, self._nonfinite = [], []
        return {"loss": float(loss) / self.world, "nonfinite": int(nonfinite)}

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
        return self._processes.any(stop, self._device)
