"""The trainer of this port: the EDM2 network on a mesh of devices, with noise drawn inside the compiled step."""

import sys
import time
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from backends.pipeline.data import batches as data
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.resolve import microbatches
from backends.ports import Machine
from backends.trainer import Measurement, Trainer
from edm2_core import loss as objective
from edm2_core.codec import Codec
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize
from edm2_core.state import Arrays, State

from . import attention, weights
from . import device as devices
from .network import network_denoiser
from .step import (
    Batch,
    Metrics,
    TrainState,
    compiled,
    draw_batch,
    from_state,
    in_parts,
    init,
    make_network_step,
    state_shapes,
    to_state,
)
from .telemetry import Measured, make_measure, summarize_rows, to_measurement


class JaxTrainer(Trainer):
    """Noise is a function of (seed, images seen), however many devices share the batch.

    Where the config asks for telemetry, every step returns the row summaries of its gradients, so that a measured step
    and a plain one run the same program and training continues exactly alike.
    """

    def __init__(self, config: TrainConfig, machine: Machine) -> None:
        super().__init__()
        self._state: TrainState
        self._began: float | None = time.monotonic()  # None once the first step is done
        self._config, self._nimg = config, 0
        self._mesh = devices.mesh_of(devices.choose(machine.device))
        self.rank, self.world = jax.process_index(), jax.process_count()
        self.team = devices.team()
        self.device = devices.describe(list(self._mesh.devices.flat))
        count, batch = self._mesh.size, config.hyper.batch
        self._microbatch = batch // microbatches(batch, machine.batch_per_device, world=count)
        self._recomputes = machine.activation_checkpoint
        self._attend = attention.fastest(self._mesh.devices.flat[0])
        with self._memory(batch // self.world):
            self._step = self._compiled_step()  # before there is a state: compiling needs memory as well
            params = initialize(config.network, seed=config.seed)
            self._place(init(config.network, params, sigma_rels=config.hyper.lengths))

    @property
    def nimg(self) -> int:
        return self._nimg

    def _compiled_step(self) -> Any:
        """Ahead of time, for the shapes of this config."""
        network, mesh = self._config.network, self._mesh
        state = state_shapes(network, sigma_rels=self._config.hyper.lengths)
        placed = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            devices.state_sharding(mesh, state),
        )
        return compiled(
            self._noisy_step(),
            placed,
            self._batch_shapes(),
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.eval_shape(jax.random.key, 0),
            platform=mesh.devices.flat[0].platform,
        )

    def _batch_shapes(self) -> data.Batch:
        """Shapes and dtypes of what :meth:`place` returns."""
        config, network, batch = self._config, self._config.network, self._config.hyper.batch

        def shared(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=devices.batch_sharding(self._mesh))

        def image(codec: Codec, channels: int) -> jax.ShapeDtypeStruct:
            stored = 2 * channels if codec.stored == "moments" else channels
            return shared(jnp.uint8 if codec.stored == "uint8" else jnp.float32, *network.image_size, stored)

        summary, format = config.data_summary, config.format
        vectors = summary is not None and summary.vectors
        labels = shared(jnp.float32, network.label_dim) if vectors else shared(jnp.int32)
        return data.Batch(
            image(format.codec, network.img_channels),
            labels if network.label_dim else None,
            image(format.condition, network.cond_channels) if format.condition and network.cond_channels else None,
            shared(jnp.bool_) if config.flip else None,
        )

    def _noisy_step(self) -> Any:
        network, hyper = self._config.network, self._config.hyper
        step = make_network_step(
            network,
            **hyper.of_step,
            microbatch=self._microbatch,
            frozen=self._config.frozen,
            dtype=self._dtype,
            recomputes=self._recomputes,
            attend=self._attend,
            summarize=partial(summarize_rows, network) if self._config.telemetry else None,
        )
        draw = self._draw

        def train_step(state: TrainState, batch: data.Batch, lr: Array, key: Array) -> tuple[TrainState, Metrics]:
            noisy, dropout = draw(batch, key)
            return step(state, noisy, dropout, lr=lr)

        return train_step

    @cached_property
    def _measure(self) -> Any:
        """Compiled at the first measured step; its result is whole on every device."""
        measure, draw = make_measure(self._config.network, microbatch=self._microbatch, dtype=self._dtype), self._draw

        def of_step(before: dict[str, Array], state: TrainState, batch: data.Batch, key: Array) -> Measured:
            return measure(before, state, draw(batch, key)[0])

        return jax.jit(of_step, out_shardings=devices.whole(self._mesh))

    def _draw(self, batch: data.Batch, key: Array) -> tuple[Batch, Array]:
        """What a network sees of a batch, with noise, and a key for dropout."""
        network, hyper, latent = self._config.network, self._config.hyper, None
        if self._config.format.codec.stored == "moments":
            shape = (len(batch.images), *network.image_size, network.img_channels)
            latent = jax.random.normal(jax.random.split(key, 4)[3], shape)  # draw_batch takes the first three
        images, labels, condition = self._prepared(batch, latent)
        return draw_batch(images, labels, key, P_mean=hyper.P_mean, P_std=hyper.P_std, condition=condition)

    def _prepared(self, batch: data.Batch, latent: Array | None = None) -> tuple[Array, Array | None, Array | None]:
        label_dim = self._config.network.label_dim
        return data.prepared(batch, self._config.format, label_dim=label_dim, channels=3, width=2, normal=latent)

    @property
    def _dtype(self) -> Any:
        return getattr(jnp, self._config.precision)

    def place(self, batch: data.Batch, /) -> data.Batch:
        """This process's share as part of the whole batch."""

        def native(array: np.ndarray | None) -> np.ndarray | None:
            if array is None:
                return None
            array = array.astype(np.int32) if array.dtype == np.int64 else array
            return np.ascontiguousarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)

        whole = partial(jax.make_array_from_process_local_data, devices.batch_sharding(self._mesh))
        return data.Batch(*(None if array is None else whole(array) for array in map(native, batch)))

    def take_evaluation(self, batch: data.Batch, unit_noise: np.ndarray, sigma: np.ndarray, /) -> np.ndarray:
        noise = self.place(data.Batch(unit_noise, sigma))
        params = {**self._state.params, **(self._state.constants or {})}
        losses = np.asarray(self._evaluation(params, batch, noise.images, noise.labels))
        share = len(losses) // self.world
        return losses[self.rank * share : (self.rank + 1) * share]

    @cached_property
    def _evaluation(self) -> Any:
        """The losses of a whole batch, whole on every device."""
        network, microbatch = self._config.network, self._microbatch
        denoise = network_denoiser(network, self._dtype, False, self._attend)

        def of_part(params: Any, part: Batch) -> Array:
            noisy = part.images + part.unit_noise * part.sigma
            denoised, _ = denoise(params, noisy, part.sigma, part.labels, part.condition)
            weight = objective.weight(part.sigma, sigma_data=network.sigma_data)
            return (weight * jnp.square(denoised - part.images)).mean(axis=(1, 2, 3))

        def evaluation(params: Any, batch: data.Batch, noise: Array, sigma: Array) -> Array:
            images, labels, condition = self._prepared(batch)
            parts = in_parts(Batch(images, noise, sigma.reshape(-1, 1, 1, 1), labels, condition), microbatch)
            return jax.lax.map(partial(of_part, params), parts).ravel()

        return jax.jit(evaluation, out_shardings=devices.whole(self._mesh))

    def take_step(self, batch: data.Batch, *, lr: float) -> tuple[Array, Array]:
        metrics = self._advance(batch, self._key(), lr=lr)
        return metrics.loss, metrics.nonfinite

    def take_measured_step(self, batch: data.Batch, *, lr: float) -> tuple[tuple[Array, Array], Measurement]:
        if not self._config.telemetry:
            raise InputError("steps can be measured where the config has telemetry, got 0: set telemetry")
        before = jax.tree.map(jnp.copy, self._state.params)  # a step is given the memory of its state
        key = self._key()
        metrics = self._advance(batch, key, lr=lr)
        measured, gradients = jax.device_get((self._measure(before, self._state, batch, key), metrics.gradients))
        return (metrics.loss, metrics.nonfinite), to_measurement(self._config.network, measured, gradients)

    def _key(self) -> Array:
        """The key of the next step's noise."""
        key, nimg = jax.random.key(self._config.seed), self._nimg
        return jax.random.fold_in(jax.random.fold_in(key, nimg >> 31), nimg & 0x7FFFFFFF)

    def _advance(self, batch: data.Batch, key: Array, *, lr: float) -> Metrics:
        self._state, metrics = self._step(self._state, batch, jnp.float32(lr), key)
        self._nimg += self._config.hyper.batch
        if self._began is not None:
            jax.block_until_ready(metrics)
            if self.rank == 0:
                seconds = time.monotonic() - self._began
                print(f"first step after {seconds:.1f} s, compilation included", file=sys.stderr)
            self._began = None
        return metrics

    def fetch(self, values: Sequence[Any], /) -> np.ndarray:
        if self.team.world == 1:
            return np.array(jax.device_get(list(values)))
        with devices.meeting():  # it waits for the messages of the steps
            return np.array(jax.device_get(list(values)))

    def mean_over_processes(self, value: float, /) -> float:
        """The mean of ``value`` in float32."""
        if self.world == 1:
            return value
        with devices.meeting():
            return float(np.mean(multihost_utils.process_allgather(np.float32(value))))

    def is_out_of_memory(self, error: Exception, /) -> bool:
        return devices.is_out_of_memory(error)

    def images_at_a_time(self, count: int, /) -> int:
        return self._microbatch // self._mesh.size

    def parameters(self, names: Collection[str] | None = None, /) -> Arrays:
        return weights.dump({**self._state.params, **(self._state.constants or {})}, names)

    def average(self, length: Length, names: Collection[str] | None = None, /) -> Arrays:
        averages = self._state.opt_state[-1].averages
        return weights.dump({**averages[length.key], **(self._state.constants or {})}, names)

    def state(self, names: Collection[str] | None = None, /) -> State:
        return to_state(self._state, names)

    def state_alone(self, error: Exception, /) -> State | None:
        """None also where the step had been given the memory of the state, before it failed."""
        arrays = jax.tree.leaves(self._state)
        there = all(not x.is_deleted() and (x.is_fully_addressable or x.is_fully_replicated) for x in arrays)
        return to_state(self._state) if there else None

    def load_state(self, state: State, /) -> None:
        self._place(from_state(self._config.network, state, place=self._on_devices))
        self._nimg = state.nimg

    def _on_devices(self, array: np.ndarray) -> Array:
        """Each device is given its part: none holds a state that others share."""
        native = np.asarray(weights.to_native(array), np.float32)
        sharding = devices.state_sharding(self._mesh, native)
        return jax.make_array_from_callback(native.shape, sharding, lambda index: np.asarray(native[index], order="C"))

    def _place(self, state: TrainState) -> None:
        self._state = jax.device_put(state, devices.state_sharding(self._mesh, state))
