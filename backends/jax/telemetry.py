"""What a training step is made of, measured beside it: see :mod:`backends.pipeline.runs.telemetry`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from backends.pipeline.runs.telemetry import Measurement, watched
from edm2_core import loss as objective
from edm2_core.network import NetworkConfig

from .network import denoise, fan_axes, watching
from .step import Batch, State, force_weight_norm, in_parts

Rows = dict[str, Array]  # by weight, [2]


class Start(NamedTuple):
    """What a step moves, before it does."""

    params: dict[str, Array]
    moments: dict[str, Array]


class Found(NamedTuple):
    """:class:`~backends.pipeline.runs.telemetry.Measurement`, on the device."""

    activations: Rows
    weights: Rows
    gradients: Rows
    updates: Rows
    loss: Array
    u: Array
    sigma: Array


def start_of(state: State) -> Start:
    """Copies: the step is given the memory of its state."""
    copies: Start = jax.tree.map(jnp.copy, Start(state.params, state.adam.mu))
    return copies


def make_measure(
    config: NetworkConfig, *, betas: tuple[float, float], microbatch: int, dtype: Any
) -> Callable[[Start, State, Batch], Found]:
    """``measure(before, after, batch)`` of a step, to be jitted. Gradients are those that Adam's first moment took in:
    it is all that a step keeps of them."""
    names = [name for weights in watched(config).values() for name in weights]

    def forward(params: Mapping[str, Array], batch: Batch) -> tuple[dict[str, Array], Array, Array]:
        """Magnitudes of activations, [images, features]; loss and u of each image, [N]; without dropout."""
        with watching() as seen:
            noisy = batch.images + batch.unit_noise * batch.sigma
            denoised, logvar = denoise(config, params, noisy, batch.sigma, batch.labels, dtype=dtype)
        weight = objective.weight(batch.sigma, sigma_data=config.sigma_data)
        loss = (weight * jnp.square(denoised - batch.images)).mean(axis=(1, 2, 3))
        return {name: _magnitudes(seen[name]) for name in names}, loss, logvar.ravel()

    def measure(before: Start, after: State, batch: Batch) -> Found:
        params = {**before.params, **after.constants}
        magnitudes, loss, u = lax.map(lambda part: forward(params, part), in_parts(batch, microbatch))
        begin = force_weight_norm(config, before.params)
        keep = betas[0]
        return Found(
            activations={name: _summary(of) for name, of in magnitudes.items()},
            weights={name: _by_feature(begin[name]) for name in names},
            gradients={
                name: _by_feature((after.adam.mu[name] - keep * before.moments[name]) / (1 - keep)) for name in names
            },
            updates={name: jnp.stack([_norm(after.params[name] - begin[name]), _norm(begin[name])]) for name in names},
            loss=loss.ravel(),
            u=u.ravel(),
            sigma=batch.sigma.ravel(),
        )

    return measure


def fetched(config: NetworkConfig, found: Found) -> Measurement:
    """On the host."""
    host = jax.device_get(found)
    return Measurement(**host._replace(u=host.u if config.switches.uncertainty else None)._asdict())


def _magnitudes(y: Array) -> Array:
    """Root mean square over pixels of [N, H, W, C] or [N, C]."""
    square = jnp.square(y.astype(jnp.float32))
    return jnp.sqrt(square.mean(axis=(1, 2)) if y.ndim == 4 else square)


def _summary(magnitudes: Array) -> Array:
    return jnp.stack([magnitudes.max(), magnitudes.mean()])


def _by_feature(weight: Array) -> Array:
    return _summary(jnp.sqrt(jnp.square(weight).mean(axis=fan_axes(weight))))


def _norm(weight: Array) -> Array:
    return jnp.linalg.norm(weight.ravel())
