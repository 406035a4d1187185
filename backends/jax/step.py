"""One training step as a pure function, and the state that it moves.

The order matters (SPEC STEP): force the stored weights onto their spheres; loss and gradients through the
normalization; gradients made finite; Adam; averages of the stored weights, after Adam and before the next forcing.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from backends.pipeline.checkpoints.states import State as Stored
from edm2_core import loss as objective
from edm2_core.ema import as_length
from edm2_core.network import NetworkConfig, plan

from . import ema, weights
from .network import Params, denoise, fan_axes, normalize


class Batch(NamedTuple):
    """images and unit_noise [N, H, W, C], sigma [N, 1, 1, 1], labels [N, label_dim] or None; all float32."""

    images: Array
    unit_noise: Array
    sigma: Array
    labels: Array | None = None


class State(NamedTuple):
    """A network in training, a pytree: what is trained, Fourier constants, Adam's moments, averages with the clock."""

    params: dict[str, Array]
    constants: dict[str, Array]
    adam: optax.ScaleByAdamState
    averages: ema.PowerEMAState


class Metrics(NamedTuple):
    """Mean loss per element, and the number of gradient elements that were not finite and were zeroed."""

    loss: Array
    nonfinite: Array


def in_parts(batch: Batch, size: int) -> Batch:
    """An axis in front, of parts of ``size`` images, which must divide the batch."""
    parts: Batch = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
    return parts


Step = Callable[[State, Batch, Array, Array], tuple[State, Metrics]]


def init(config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, sigma_rels: Sequence[float]) -> State:
    """A state before its first step, from canonical ``params``."""
    native, table = weights.load(config, params), plan(config).parameters
    trained = {name: array for name, array in native.items() if table[name].trained}
    constants = {name: array for name, array in native.items() if not table[name].trained}
    return State(trained, constants, optax.scale_by_adam().init(trained), ema.init(trained, sigma_rels=sigma_rels))


def state_shapes(config: NetworkConfig, /, *, sigma_rels: Sequence[float]) -> State:
    """What :func:`init` makes, as shapes and dtypes alone: to compile a step for before there is a state."""
    shapes = {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in plan(config).parameters.items()}
    found: State = jax.eval_shape(partial(init, config, sigma_rels=tuple(sigma_rels)), shapes)
    return found


def batch_loss(
    config: NetworkConfig, params: Params, batch: Batch, *, dtype: Any = jnp.float32, dropout: Array | None = None
) -> Array:
    """The loss of each element, [N, H, W, C], float32. Source: Eq. 21."""
    noisy = batch.images + batch.unit_noise * batch.sigma
    denoised, logvar = denoise(config, params, noisy, batch.sigma, batch.labels, dtype=dtype, dropout=dropout)
    return objective.loss(denoised, batch.images, batch.sigma, logvar, sigma_data=config.sigma_data)


def force_weight_norm(config: NetworkConfig, params: Params) -> dict[str, Array]:
    """The stored weights back on their spheres, on rungs that do. Source: Eq. 66."""
    table = plan(config).parameters
    return {name: normalize(w, fan_axes(w)) if table[name].normalized else w for name, w in params.items()}


def make_step(
    config: NetworkConfig,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    loss_scaling: float = 1.0,
    microbatch: int | None = None,
    dtype: Any = jnp.float32,
) -> Step:
    """A pure ``step(state, batch, lr, key) -> (state, metrics)``, to be jitted with the state donated.

    Args:
        betas: of Adam, eps 1e-8.
        loss_scaling: the loss is multiplied, its gradients divided by it: lifts float16 gradients above underflow.
        microbatch: images per forward pass; larger batches accumulate gradients in a scan.
        dtype: of activations; parameters stay float32.

    ``key`` is that of dropout.
    """
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=1e-8)

    def scaled(params: Params, constants: Params, part: Batch, total: int, key: Array) -> tuple[Array, Array]:
        values = batch_loss(config, {**params, **constants}, part, dtype=dtype, dropout=key if config.dropout else None)
        return values.sum() * (loss_scaling / total), values.sum()

    def gradients(params: Params, constants: Params, batch: Batch, key: Array) -> tuple[Params, Array]:
        total = len(batch.images)
        take = jax.grad(scaled, has_aux=True)
        if microbatch is None or microbatch >= total:
            return take(params, constants, batch, total, key)
        parts = in_parts(batch, microbatch)

        def add(carry: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
            index, part = indexed
            return jax.tree.map(
                jnp.add, carry, take(params, constants, part, total, jax.random.fold_in(key, index))
            ), None

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
        return lax.scan(add, zero, (jnp.arange(total // microbatch), parts))[0]

    def step(state: State, batch: Batch, lr: Array, key: Array) -> tuple[State, Metrics]:
        params = force_weight_norm(config, state.params)
        found, loss = gradients(params, state.constants, batch, key)
        found = jax.tree.map(lambda g: g / loss_scaling, found)
        nonfinite = sum(jnp.sum(~jnp.isfinite(g)) for g in found.values())
        found = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), found)
        updates, moments = adam.update(found, state.adam)
        params = {name: params[name] - lr * updates[name] for name in params}
        count = len(batch.images)
        time = state.averages.time + jnp.asarray(count, jnp.uint32)
        averages = ema.update(state.averages, params, time=time, delta=count)
        metrics = Metrics(loss / batch.images.size, jnp.asarray(nonfinite))
        return State(params, state.constants, moments, averages), metrics

    return step


def compiled(step: Callable[..., tuple[State, Metrics]], *example: Any, cpu: bool) -> Step:
    """``step`` for arguments like ``example``, arrays or their shapes, of which the first is donated.

    On a CPU, operations run in the order that takes least memory; by default all that can, run at once, and their
    results wait. Compiling is where a small run takes most: what is free goes back to the system before and after.
    """
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if cpu else None
    _give_back()
    made = jax.jit(step, donate_argnums=0, compiler_options=options).lower(*example).compile()
    _give_back()
    return made


def _give_back() -> None:
    """Return freed memory to the system, where the C library keeps it."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def to_stored(state: State) -> Stored:
    """The state in the canonical form that all ports share."""
    constants = weights.dump(state.constants)
    return Stored(
        params={**weights.dump(state.params), **constants},
        moments1=weights.dump(state.adam.mu),
        moments2=weights.dump(state.adam.nu),
        averages={as_length(s): {**weights.dump(a), **constants} for s, a in state.averages.averages.items()},
        nimg=int(state.averages.time),
        steps=int(state.adam.count),
    )


def from_stored(config: NetworkConfig, stored: Stored) -> State:
    """Go on from ``stored``, whichever port wrote it."""
    state = init(config, stored.params, sigma_rels=tuple(stored.averages))

    def native(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return {name: jnp.array(weights.to_native(np.asarray(arrays[name], np.float32))) for name in state.params}

    adam = optax.ScaleByAdamState(
        count=jnp.asarray(stored.steps, jnp.int32), mu=native(stored.moments1), nu=native(stored.moments2)
    )
    averages = {repr(as_length(s)): native(arrays) for s, arrays in stored.averages.items()}
    return State(state.params, state.constants, adam, ema.PowerEMAState(jnp.asarray(stored.nimg, jnp.uint32), averages))
