"""One training step as a pure function of any denoiser, and the state that it advances.

The order matters (SPEC STEP): force the stored weights onto their spheres; loss and gradients through the
normalization; gradients made finite; Adam; averages of the stored weights, after Adam and before the next forcing.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from backends.pipeline.runs import freed_memory
from edm2_core import loss as objective
from edm2_core.ema import Length, LengthLike
from edm2_core.network import NetworkConfig, plan
from edm2_core.state import State

from . import weights
from .attention import Attend, by_products
from .clocks import words
from .denoiser import Denoise, Tree
from .ema import PowerEMAState, power_ema
from .network import Params, fan_axes, folded, network_denoiser, normalize


class Batch(NamedTuple):
    """images and unit_noise [N, ...], sigma [N, 1, ...] with as many axes, labels [N, label_dim] or None, condition
    [N, ..., cond_channels] or None; float32."""

    images: Array
    unit_noise: Array
    sigma: Array
    labels: Any = None
    condition: Array | None = None


class TrainState(NamedTuple):
    """A network in training, a pytree. ``opt_state`` is the optimizer's, averages of the weights included.

    ``constants``: arrays by name that the network reads beside ``params`` and that are not trained, or None.
    """

    params: Tree
    opt_state: Any
    constants: dict[str, Array] | None = None


class Metrics(NamedTuple):
    """Mean loss per element; the number of gradient elements that were not finite and were zeroed; and what
    ``summarize`` made of the gradients."""

    loss: Array
    nonfinite: Array
    gradients: Any = None


Step = Callable[..., tuple[TrainState, Metrics]]
T = TypeVar("T")


# ---- any network


def draw_batch(
    images: Array, labels: Any, key: Array, *, P_mean: float, P_std: float, condition: Array | None = None
) -> tuple[Batch, Array]:
    """Noise and noise levels for ``images`` [N, ...], and a second key, for dropout. Source: Eq. 16."""
    normal, noise, dropout = jax.random.split(key, 3)
    draws = jax.random.normal(normal, (len(images), *(1,) * (images.ndim - 1)))
    sigma = objective.noise_level(draws, P_mean=P_mean, P_std=P_std)
    return Batch(images, jax.random.normal(noise, images.shape), sigma, labels, condition), dropout


def batch_loss(
    denoise: Denoise, params: Tree, batch: Batch, *, sigma_data: float = 0.5, keys: Array | None = None
) -> Array:
    """The loss of each element, like ``batch.images``, float32. Source: Eq. 21. ``keys`` [N]: of dropout, or None."""
    noisy = batch.images + batch.unit_noise * batch.sigma
    given = (batch.labels,) if batch.condition is None else (batch.labels, batch.condition)
    denoised, logvar = denoise(params, noisy, batch.sigma, *given, key=keys)
    return objective.loss(denoised, batch.images, batch.sigma, logvar, sigma_data=sigma_data)


def in_parts(batch: T, size: int) -> T:
    """``batch``, a pytree, with a new first axis, of parts of ``size`` images, which must divide it."""
    parts: T = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
    return parts


def make_step(
    denoise: Denoise,
    optimizer: optax.GradientTransformation,
    *,
    sigma_data: float = 0.5,
    force: Callable[[Tree], Tree] = lambda params: params,
    prepare: Callable[[Tree], Tree] = lambda params: params,
    loss_scaling: float = 1.0,
    microbatch: int | None = None,
    summarize: Callable[[Tree], Any] | None = None,
    frozen: Collection[str] = (),
) -> Step:
    """A pure ``step(state, batch, key, **extra) -> (state, metrics)``, to be jitted with the state donated.

        optimizer = optax.chain(optax.adam(1e-3), power_ema())
        step = jax.jit(make_step(denoiser(backbone), optimizer), donate_argnums=0)
        state, metrics = step(TrainState(params, optimizer.init(params)), batch, key)

    Args:
        denoise: as :func:`~.denoiser.denoiser` makes it.
        optimizer: of optax; its ``update`` is also given ``extra`` and ``t_delta``, the images of the batch, by which
            :func:`~.ema.power_ema` advances its clock.
        force: applied to the trained parameters as the step begins.
        prepare: turns the trained parameters into others that ``denoise`` takes as well and gives the same answers for.
            Called once a step where a batch is divided: each part has less to compute, and so has its derivative.
        loss_scaling: the loss is multiplied and its gradients divided by it: keeps float16 gradients above underflow.
        microbatch: images per forward pass; larger batches accumulate gradients in a scan.
        frozen: keys of the parameters that are not trained: their gradients are 0.
        summarize: a function of the gradients that the optimizer receives; its result is ``Metrics.gradients``.

    ``key`` is that of dropout, or None. ``denoise`` is given keys, one an image: what is dropped of an image does not
    depend on how the batch is divided, among devices or into parts. Source: SPEC STEP, Eq. 21.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def scaled(params: Tree, constants: Any, part: Batch, total: int, keys: Array | None) -> tuple[Array, Array]:
        every = {**params, **constants} if constants else params
        values = batch_loss(denoise, every, part, sigma_data=sigma_data, keys=keys).sum()
        return values * (loss_scaling / total), values

    def gradients_of(params: Tree, constants: Any, batch: Batch, key: Array | None) -> tuple[Tree, Array]:
        total = len(batch.images)
        keys = None if key is None else jax.random.split(key, total)
        gradient = jax.grad(scaled, has_aux=True)
        if microbatch is None or microbatch >= total:
            return gradient(params, constants, batch, total, keys)
        working, pull = jax.vjp(prepare, params)

        def add(sums: Any, part: tuple[Batch, Array | None]) -> tuple[Any, None]:
            images, own = part
            return jax.tree.map(jnp.add, sums, gradient(working, constants, images, total, own)), None

        zero = (jax.tree.map(jnp.zeros_like, working), jnp.zeros(()))
        (gradients, loss), _ = lax.scan(add, zero, in_parts((batch, keys), microbatch))
        return pull(gradients)[0], loss

    def step(state: TrainState, batch: Batch, key: Array | None = None, **extra: Any) -> tuple[TrainState, Metrics]:
        params = force(state.params)
        gradients, loss = gradients_of(params, state.constants, batch, key)
        gradients = jax.tree.map(lambda g: g / loss_scaling, gradients)
        fits = jax.tree.map(lambda g: jnp.abs(g) < objective.LARGEST_GRADIENT, gradients)  # NaN is not less
        nonfinite = sum(jnp.sum(~there) for there in jax.tree.leaves(fits))
        gradients = jax.tree.map(lambda g, there: jnp.where(there, g, 0), gradients, fits)
        if frozen:
            gradients = {name: jnp.zeros_like(g) if name in frozen else g for name, g in gradients.items()}
        extra = {"t_delta": len(batch.images), **extra}
        updates, opt_state = optimizer.update(gradients, state.opt_state, params, **extra)
        metrics = Metrics(loss / batch.images.size, jnp.asarray(nonfinite), summarize(gradients) if summarize else None)
        return TrainState(optax.apply_updates(params, updates), opt_state, state.constants), metrics

    return step


_COMPILER: dict[str, dict[str, Any]] = {
    # operations run in the order that needs least memory; by default all that can run at once do, and are held
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    # cuDNN's own choice of convolutions; to time each of them, as is the default, takes minutes
    "gpu": {"xla_gpu_autotune_level": 0},
}


def compiled(step: Step, *example: Any, platform: str) -> Step:
    """``step`` compiled for arguments like ``example``, arrays or their shapes, of which the first is donated.

    Compiling takes most of a small run's memory: what is free is returned before and after.
    """
    freed_memory.give_back()
    executable = jax.jit(step, donate_argnums=0, compiler_options=_COMPILER.get(platform)).lower(*example).compile()
    freed_memory.give_back()
    return executable


# ---- the EDM2 network


def adam_with_averages(
    sigma_rels: Sequence[LengthLike], *, betas: tuple[float, float] = (0.9, 0.99)
) -> optax.GradientTransformationExtraArgs:
    """Adam with eps 1e-8 at the learning rate ``lr=`` of each update, and averages ``sigma_rels`` of the weights."""
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=1e-8)
    return optax.chain(adam, scale_by_given_rate(), power_ema(sigma_rels))


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Updates times -lr, where ``lr`` comes with each call of ``update``."""

    def update(updates: Tree, state: Any, params: Tree = None, *, lr: Any, **_: Any) -> tuple[Tree, Any]:
        return jax.tree.map(lambda u: -lr * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_network_step(
    config: NetworkConfig,
    *,
    sigma_rels: Sequence[LengthLike],
    betas: tuple[float, float] = (0.9, 0.99),
    dtype: Any = jnp.float32,
    recomputes: bool = False,
    attend: Attend = by_products,
    **options: Any,
) -> Step:
    """:func:`make_step` of the EDM2 network; activations in ``dtype``, parameters float32. Called with ``lr=``.
    ``recomputes`` and ``attend``: as in :func:`~.network.unet`.

    ``options``: ``loss_scaling``, ``microbatch``, ``frozen`` and ``summarize``.
    """
    return make_step(
        network_denoiser(config, dtype, recomputes, attend),
        adam_with_averages(sigma_rels, betas=betas),
        sigma_data=config.sigma_data,
        force=partial(force_weight_norm, config),
        prepare=partial(folded, config),
        **options,
    )


def force_weight_norm(config: NetworkConfig, params: Params) -> dict[str, Array]:
    """The stored weights back on their spheres, on rungs with forced normalization. Source: Eq. 66."""
    table = plan(config).parameters
    return {name: normalize(w, fan_axes(w)) if table[name].normalized else w for name, w in params.items()}


def init(config: NetworkConfig, params: Mapping[str, np.ndarray], /, *, sigma_rels: Sequence[LengthLike]) -> TrainState:
    """The state before the first step, from canonical ``params``."""
    trained, constants = weights.load_divided(config, params)
    return TrainState(trained, adam_with_averages(sigma_rels).init(trained), constants)


def state_shapes(config: NetworkConfig, /, *, sigma_rels: Sequence[LengthLike]) -> TrainState:
    """The shapes and dtypes of what :func:`init` makes, to compile a step before there is a state."""
    shapes = {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in plan(config).parameters.items()}
    state: TrainState = jax.eval_shape(partial(init, config, sigma_rels=tuple(sigma_rels)), shapes)
    return state


def to_state(state: TrainState, names: Collection[str] | None = None, /) -> State:
    """The canonical form, which all ports share, of a state of the EDM2 network: all of it, or what belongs to the
    parameters ``names``. Where processes hold parts of the arrays, all must call it together."""

    def some(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return weights.dump(arrays, names)

    adam, _, averages = state.opt_state
    constants = some(state.constants or {})
    return State(
        params={**some(state.params), **constants},
        moments1=some(adam.mu),
        moments2=some(adam.nu),
        averages={Length.of(key): {**some(a), **constants} for key, a in averages.averages.items()},
        nimg=int(averages.time),
        steps=int(adam.count),
    )


def from_state(config: NetworkConfig, state: State, *, place: weights.Place = weights.to_device) -> TrainState:
    """The inverse of :func:`to_state`, whichever port wrote ``state``; each array is placed as it is read."""
    trained, constants = weights.load_divided(config, state.params, place=place)

    def native(arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
        return {name: place(arrays[name]) for name in trained}

    adam = optax.ScaleByAdamState(jnp.asarray(state.steps, jnp.int32), native(state.moments1), native(state.moments2))
    averages = {length.key: native(arrays) for length, arrays in state.averages.items()}
    clock = words(state.nimg)
    return TrainState(trained, (adam, optax.EmptyState(), PowerEMAState(clock, averages)), constants)
