"""The trainer that the training loop drives: a learner on this process's device, and the noise of its batches."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.pipeline.data import batches as data
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.team import PeerLost, meeting
from backends.ports import Machine
from backends.trainer import Measurement, Trainer
from edm2_core import loss as objective
from edm2_core.ema import Length
from edm2_core.loss import noise_level
from edm2_core.network import initialize
from edm2_core.state import Arrays, State

from . import device as devices
from .compiling import compile_mode, eagerly, made_ready
from .denoiser import evaluating
from .step import Batch, Learner
from .telemetry import measured
from .weights import build, dump, tensors

_EXHAUSTED = ("can't allocate memory", "DefaultCPUAllocator")  # of the CPU's allocator, which raises RuntimeError


class TorchTrainer(Trainer):
    """See :class:`backends.trainer.Trainer`. Several processes are those of ``torchrun``."""

    def __init__(self, config: TrainConfig, machine: Machine):
        super().__init__()
        self._processes = devices.Processes.here()
        self.rank, self.world = self._processes.rank, self._processes.world
        self._device = devices.choose(machine.device)
        self.team = self._processes.team(self._device)
        devices.allow_tf32(self._device)
        on_cuda = self._device.type == "cuda"
        tf32 = ", products of float32 in TF32" if on_cuda and config.precision == "float32" else ""
        self.device = devices.describe(self._device) + tf32
        self._config = config
        self._copies = torch.cuda.Stream(self._device) if on_cuda else None
        self._compute = torch.cuda.current_stream(self._device) if on_cuda else None
        hyper, params = config.hyper, initialize(config.network, seed=config.seed)
        network = build(config.network, params, device=self._device, dtype=getattr(torch, config.precision))
        network.unet.recomputes = machine.activation_checkpoint
        mode = compile_mode(machine.compile, self._device)
        shards = machine.shard and self.world > 1
        self.measures = not shards  # which needs whole weights in each process
        made_ready(network, self._device, mode, by_block=machine.compile == "blocks", sharded=shards)
        self.learner = Learner(
            network,
            **hyper.of_step,
            microbatch=machine.batch_per_device,
            world=self.world,
            frozen=config.frozen,
            compiles=mode is not None,
            shards=shards,
        )

    @property
    def nimg(self) -> int:
        return self.learner.nimg

    def place(self, batch: data.Batch, /) -> data.Batch:
        """On CUDA by way of pinned memory and a stream of its own; the copy is complete when this returns."""
        tensors = (None if array is None else torch.from_numpy(array) for array in batch)
        if self._copies is None or self._compute is None:
            return data.Batch(*(None if x is None else x.to(self._device) for x in tensors))
        with torch.cuda.stream(self._copies):
            placed = [None if x is None else x.pin_memory().to(self._device, non_blocking=True) for x in tensors]
        for tensor in placed:
            if tensor is not None:
                tensor.record_stream(self._compute)  # its memory is reused only when a step has read it
        self._copies.synchronize()
        return data.Batch(*placed)

    def take_step(self, batch: data.Batch, *, lr: float) -> tuple[Any, Any]:
        return self.learner.step(self._batch(batch), lr=lr)

    def take_measured_step(self, batch: data.Batch, *, lr: float) -> tuple[tuple[Any, Any], Measurement]:
        return measured(self.learner, self._batch(batch), lr=lr)

    @torch.no_grad()
    def take_evaluation(self, batch: data.Batch, unit_noise: np.ndarray, sigma: np.ndarray, /) -> np.ndarray:
        images, labels, condition = self._prepared(batch)
        noise, level = (torch.from_numpy(x).to(self._device) for x in (unit_noise, sigma.reshape(-1, 1, 1, 1)))
        whole = Batch(images, noise, level, labels, condition)
        losses, network = [], self.learner.network
        with evaluating(network), eagerly():  # a part of another size would be compiled
            for part in whole.split(self.learner.microbatch):
                noisy = part.images + part.unit_noise * part.sigma
                denoised, _ = network(noisy, part.sigma, part.labels, part.condition)
                weight = objective.weight(part.sigma, sigma_data=self._config.network.sigma_data)
                losses.append((weight * (denoised - part.images).square()).flatten(1).mean(dim=1))
        return torch.cat(losses).cpu().numpy()

    def _prepared(self, batch: data.Batch, latent: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return data.prepared(batch, self._config.format, label_dim=self._config.network.label_dim, normal=latent)

    def _batch(self, batch: data.Batch) -> Batch:
        """With noise, and seeds of dropout, functions of (seed, images seen). They are drawn for the whole batch and
        cut to this process's share, so the number of processes has no effect on them."""
        config, hyper = self._config, self._config.hyper
        key = np.random.SeedSequence([config.seed, self.nimg]).generate_state(2, np.uint64) >> np.uint64(1)
        generator = torch.Generator(self._device).manual_seed(int(key[0]))
        shape = (hyper.batch, config.network.img_channels, *config.network.image_size)
        normal = torch.randn((hyper.batch, 1, 1, 1), generator=generator, device=self._device)
        noise = torch.randn(shape, generator=generator, device=self._device)
        sigma = noise_level(normal, P_mean=hyper.P_mean, P_std=hyper.P_std)
        share = slice(self.rank * len(batch.images), (self.rank + 1) * len(batch.images))
        moments = config.format.codec.stored == "moments"
        latent = torch.randn(shape, generator=generator, device=self._device)[share] if moments else None
        images, labels, condition = self._prepared(batch, latent)
        dropout = None
        if config.network.dropout:
            seeds = np.random.default_rng(key[1]).integers(-(1 << 31), 1 << 31, hyper.batch, np.int32)
            dropout = torch.from_numpy(seeds[share]).to(self._device)
        return Batch(images, noise[share], sigma[share], labels, condition, dropout)

    def fetch(self, values: Sequence[Tensor], /) -> np.ndarray:
        if self.world == 1:
            return torch.stack(list(values)).cpu().numpy()
        with meeting():  # on a GPU this waits for the messages of the steps
            return torch.stack(list(values)).cpu().numpy()

    def mean_over_processes(self, value: float, /) -> float:
        return self._processes.mean(value)

    def is_out_of_memory(self, error: Exception, /) -> bool:
        on_cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
        return on_cpu or isinstance(error, torch.OutOfMemoryError)

    def images_at_a_time(self, count: int, /) -> int:
        return min(self.learner.microbatch or count, count)

    def parameters(self, names: Collection[str] | None = None, /) -> Arrays:
        return dump(tensors(self.learner.network), names)

    def average(self, length: Length, names: Collection[str] | None = None, /) -> Arrays:
        return dump(self.learner.ema.arrays(length), names)

    def state(self, names: Collection[str] | None = None, /) -> State:
        return self.learner.state(names)

    def state_alone(self, error: Exception, /) -> State | None:
        learner = self.learner
        # a step on a GPU goes on after its call: what it received is unknown when another process is lost
        unknown = self.world > 1 and self._device.type != "cpu" and isinstance(error, PeerLost)
        return None if learner.shards or learner.updating or unknown else learner.state()

    def load_state(self, state: State, /) -> None:
        self.learner.load_state(state)
