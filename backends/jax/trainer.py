"""What the training loop drives: a network in training on a mesh of devices, with noise of its own."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from backends.pipeline.checkpoints.states import State as Stored
from backends.pipeline.runs.config import Settings, microbatches
from backends.pipeline.runs.options import TrainOptions
from backends.pipeline.runs.telemetry import Measurement
from edm2_core.errors import InputError
from edm2_core.loss import noise_level
from edm2_core.network import initialize

from . import device as devices
from .step import Batch, Metrics, State, compiled, from_stored, init, make_step, state_shapes, to_stored
from .telemetry import Found, Start, fetched, make_measure, start_of
from .weights import to_nhwc


def drawn(settings: Settings, images: Array, labels: Array | None, key: Array) -> tuple[Batch, Array]:
    """What a step sees of its ``key``: a batch with noise, and the key of its dropout."""
    normal, noise, dropout = jax.random.split(key, 3)
    sigma = noise_level(jax.random.normal(normal, (len(images), 1, 1, 1)), P_mean=settings.P_mean, P_std=settings.P_std)
    return Batch(images, jax.random.normal(noise, images.shape), sigma, labels), dropout


class JaxTrainer:
    """A :class:`~backends.pipeline.runs.training.Trainer`: noise is drawn inside the compiled step, a function of
    (seed, images seen) however many devices share the batch."""

    def __init__(self, settings: Settings, options: TrainOptions):
        self._start = time.monotonic()
        self._settings = settings
        self._mesh = devices.mesh_of(devices.choose(options.device))
        self.rank, self.world = jax.process_index(), jax.process_count()
        self.device = devices.describe(list(self._mesh.devices.flat))
        microbatches(settings.batch, options.batch_per_device, world=self._mesh.size)
        self._per_device = options.batch_per_device or settings.batch // self._mesh.size
        with self._memory():
            self._step = self._compiled(settings)  # before there is a state, for a compiler needs memory as well
            params = initialize(settings.network, seed=settings.seed)
            self._place(init(settings.network, params, sigma_rels=settings.lengths))
        self._metrics: list[Metrics] = []

    def _compiled(self, settings: Settings) -> Any:
        batch, data, classes = settings.batch, settings.data_summary, settings.network.label_dim
        state = state_shapes(settings.network, sigma_rels=settings.lengths)
        shared = partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=devices.batch_sharding(self._mesh))
        return compiled(
            self._noisy_step(settings),
            jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                state,
                devices.state_sharding(self._mesh, state),
            ),
            shared((batch, data.resolution, data.resolution, data.channels)),
            shared((batch, classes)) if classes else None,
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.eval_shape(jax.random.key, 0),
            cpu=self._mesh.devices.flat[0].platform == "cpu",
        )

    def _noisy_step(self, settings: Settings) -> Any:
        step = make_step(settings.network, loss_scaling=settings.loss_scaling, **self._common(settings))

        def train_step(
            state: State, images: Array, labels: Array | None, lr: Array, key: Array
        ) -> tuple[State, Metrics]:
            batch, dropout = drawn(settings, images, labels, key)
            return step(state, batch, lr, dropout)

        return train_step

    @cached_property
    def _measure(self) -> Any:
        """Compiled at the first step that is measured; what it finds is whole on every device."""
        measure = make_measure(self._settings.network, **self._common(self._settings))

        def of_step(before: Start, after: State, images: Array, labels: Array | None, key: Array) -> Found:
            return measure(before, after, drawn(self._settings, images, labels, key)[0])

        return jax.jit(of_step, out_shardings=devices.whole(self._mesh))

    def _common(self, settings: Settings) -> dict[str, Any]:
        microbatch = self._per_device * self._mesh.size
        return {"betas": settings.betas, "microbatch": microbatch, "dtype": getattr(jnp, settings.precision)}

    def _place(self, state: State) -> None:
        self._state = jax.device_put(state, devices.state_sharding(self._mesh, state))

    def step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> None:
        self._take(*self._given(images, labels, nimg), lr=lr)

    def measured_step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> Measurement:
        before, given = start_of(self._state), self._given(images, labels, nimg)
        self._take(*given, lr=lr)
        with self._memory():
            return fetched(self._settings.network, self._measure(before, self._state, *given))

    def _given(self, images: np.ndarray, labels: np.ndarray | None, nimg: int) -> tuple[Any, Any, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._settings.seed), nimg >> 31), nimg & 0x7FFFFFFF)
        return self._global(to_nhwc(images)), self._global(labels), key

    def _take(self, images: Any, labels: Any, key: Any, *, lr: float) -> None:
        with self._memory():
            self._state, metrics = self._step(self._state, images, labels, jnp.float32(lr), key)
            if self._start:
                jax.block_until_ready(metrics)
        if self._start:
            if self.rank == 0:
                print(f"first step after {time.monotonic() - self._start:.1f} s, compilation included", file=sys.stderr)
            self._start = 0.0
        self._metrics.append(metrics)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Raise InputError, with the batch to try, where memory runs out."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            half = max(self._per_device // 2, 1)
            raise InputError(
                f"the step must fit into memory, got none left on {self.device}: try --batch-per-device {half}"
            ) from error

    def _global(self, array: np.ndarray | None) -> Any:
        """This process's share of a batch as part of the whole."""
        if array is None:
            return None
        return jax.make_array_from_process_local_data(devices.batch_sharding(self._mesh), np.ascontiguousarray(array))

    def metrics(self) -> Mapping[str, float]:
        found, self._metrics = jax.device_get(self._metrics), []
        return {"loss": float(np.mean([m.loss for m in found])), "nonfinite": int(sum(m.nonfinite for m in found))}

    def _whole(self) -> Stored:
        state = self._state
        if self.world > 1:
            state = multihost_utils.process_allgather(state, tiled=True)
        return to_stored(state)

    def parameters(self) -> Mapping[str, np.ndarray]:
        return self._whole().params

    def averages(self) -> Mapping[float, Mapping[str, np.ndarray]]:
        return self._whole().averages

    def state(self) -> Stored:
        return self._whole()

    def load_state(self, state: Stored, /) -> None:
        self._place(from_stored(self._settings.network, state))

    def agree(self, stop: bool, /) -> bool:
        if self.world == 1:
            return stop
        return bool(np.any(multihost_utils.process_allgather(np.array(stop))))
