"""Telemetry of a training step, measured beside it; see :class:`backends.trainer.Measurement`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from backends.pipeline.runs.telemetry import watched
from backends.trainer import Measurement
from edm2_core import loss as objective
from edm2_core.network import NetworkConfig

from .network import Params, denoise_with_activations, fan_axes
from .step import Batch, TrainState, force_weight_norm, in_parts

Rows = dict[str, Array]  # by name of the weight, [2]


class Measured(NamedTuple):
    """All of :class:`~backends.trainer.Measurement` but the gradients, on the device."""

    activations: Rows
    weights: Rows
    updates: Rows
    loss: Array
    u: Array
    sigma: Array


def summarize_rows(config: NetworkConfig, arrays: Mapping[str, Array]) -> Rows:
    """Maximum and mean over features of the magnitude, of each watched weight or of its gradient."""
    return {name: _summary(_row_magnitudes(arrays[name])) for name in _names(config)}


def make_measure(
    config: NetworkConfig, *, microbatch: int, dtype: Any
) -> Callable[[Params, TrainState, Batch], Measured]:
    """``measure(before, state, batch)``, to be jitted, of the step from trained parameters ``before`` to ``state``."""
    names = _names(config)

    def forward(params: Params, batch: Batch) -> tuple[dict[str, Array], Array, Array]:
        """Magnitudes of activations, [N, features]; loss and u of each image, [N]; without dropout."""
        noisy = batch.images + batch.unit_noise * batch.sigma
        denoised, logvar, activations = denoise_with_activations(
            config, params, noisy, batch.sigma, batch.labels, batch.condition, dtype=dtype
        )
        weight = objective.weight(batch.sigma, sigma_data=config.sigma_data)
        loss = (weight * jnp.square(denoised - batch.images)).mean(axis=(1, 2, 3))
        return {name: _feature_magnitudes(activations[name]) for name in names}, loss, logvar.ravel()

    def measure(before: Params, state: TrainState, batch: Batch) -> Measured:
        params = {**before, **(state.constants or {})}
        magnitudes, loss, u = lax.map(lambda part: forward(params, part), in_parts(batch, microbatch))
        start = force_weight_norm(config, before)
        return Measured(
            activations={name: _summary(of) for name, of in magnitudes.items()},
            weights=summarize_rows(config, start),
            updates={name: jnp.stack([_norm(state.params[name] - start[name]), _norm(start[name])]) for name in names},
            loss=loss.ravel(),
            u=u.ravel(),
            sigma=batch.sigma.ravel(),
        )

    return measure


def to_measurement(config: NetworkConfig, measured: Any, gradients: Mapping[str, np.ndarray]) -> Measurement:
    """What ports return, of a :class:`Measured` and row summaries of gradients on the host."""
    u = measured.u if config.switches.uncertainty else None
    return Measurement(gradients=gradients, **measured._replace(u=u)._asdict())


def _names(config: NetworkConfig) -> list[str]:
    return [name for names in watched(config).values() for name in names]


def _feature_magnitudes(y: Array) -> Array:
    """Root mean square over pixels of [N, H, W, C] or [N, C]: [N, C]."""
    square = jnp.square(y.astype(jnp.float32))
    return jnp.sqrt(square.mean(axis=(1, 2)) if y.ndim == 4 else square)


def _row_magnitudes(weight: Array) -> Array:
    """Root mean square over the inputs of each output, [out]."""
    return jnp.sqrt(jnp.square(weight).mean(axis=fan_axes(weight)))


def _summary(magnitudes: Array) -> Array:
    return jnp.stack([magnitudes.max(), magnitudes.mean()])


def _norm(weight: Array) -> Array:
    return jnp.linalg.norm(weight.ravel())
