"""Averages of any pytree of weights, their snapshots, and averages of any other length after training.

    optimizer = optax.chain(optax.adam(1e-3), power_ema(t_delta=batch))    # last: it averages the updated weights
    ...
    save("snapshots", opt_state[-1])                                       # at intervals
    params = reconstruct("snapshots", sigma_rel=0.13, like=params)         # after training, any length

or, in a loop without optax or every few steps:

    state = init(params)                                                   # sigma_rel 0.05 and 0.10
    state = update(state, params, time=images_seen, delta=batch)           # under jit or not

Averages are float32, or wider where weights are; expm1 and log1p compute 1 - beta with a relative error of a few parts
in 10^7 however small it is. Averages share no memory with the parameters: a step may donate both. Source: arXiv
2312.02696 Section 3, Appendix C.
"""

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_arrays
from backends.pipeline.checkpoints.snapshots import save_averages
from backends.pipeline.checkpoints.sources import open_sources
from edm2_core.ema import Length, LengthLike, beta, sigma_rel_to_gamma
from edm2_core.errors import InputError

Tree = Any  # a pytree of arrays


class PowerEMAState(NamedTuple):
    """A pytree: the clock, and the averages by the text :attr:`~edm2_core.ema.Length.key` of their lengths, as in
    ``averages["0.05"]`` or ``["HalfLife(2000.0)"]``.

    ``time`` is a uint32, below 2^32. Averages have the structure of the parameters.
    """

    time: jax.Array
    averages: dict[str, Tree]


def power_ema(
    sigma_rels: Sequence[LengthLike] = (0.05, 0.10), *, t_delta: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Averages of the updated parameters; the updates themselves pass unchanged. Last in a chain.

    Args:
        sigma_rels: relative lengths; ``Length.half_life(images)`` for a traditional average.
        t_delta: by how much each update advances the clock: the images of a batch. None: it comes with each call,
            ``optimizer.update(gradients, state, params, t_delta=...)``, which takes precedence over the one given here.

    Source: Eq. 127. Dtypes: as :func:`init`.

    Raises:
        InputError: a length outside (0, 0.2887), or none; in an update without params or t_delta, or one below 1.
    """

    def start(params: Tree) -> PowerEMAState:
        return init(params, sigma_rels=sigma_rels)

    def advance(
        updates: Tree, state: PowerEMAState, params: Tree = None, *, t_delta: Any = t_delta, **_: Any
    ) -> tuple[Tree, PowerEMAState]:
        if params is None:
            raise InputError("power_ema averages parameters, got none: call optimizer.update(updates, state, params)")
        if t_delta is None:
            raise InputError("power_ema needs t_delta, got none: give it here or with each update")
        _check(t_delta, t_delta)
        time = state.time + jnp.asarray(t_delta, jnp.uint32)
        return updates, update(state, optax.apply_updates(params, updates), time=time, delta=t_delta)

    _lengths(sigma_rels)
    return optax.GradientTransformationExtraArgs(start, advance)


def init(params: Tree, *, sigma_rels: Sequence[LengthLike] = (0.05, 0.10)) -> PowerEMAState:
    """The averages before the first update, which replaces them: a copy of ``params`` for each length.

    Dtype: that of each leaf, float32 where it is a narrower floating one. Raises InputError as :func:`power_ema`.
    """
    averages = {length.key: jax.tree.map(_copy, params) for length in _lengths(sigma_rels)}
    return PowerEMAState(jnp.zeros((), jnp.uint32), averages)


def update(state: PowerEMAState, params: Tree, *, time: Any, delta: Any) -> PowerEMAState:
    """The averages at ``time``, where ``params`` were the weights for the last ``delta``. Source: Eq. 127, which is
    exact for any interval.

    ``time`` and ``delta`` are numbers or arrays, traced or not. Leaves that are not floating are copied.

    Raises:
        InputError: other shapes than those averaged; or not 0 < delta <= time, where they are numbers (where they are
            arrays, the averages become NaN).
    """
    _check(time, delta)
    averages = {}
    for key, average in state.averages.items():
        keep, share = _shares(Length.of(key), time, delta)
        averages[key] = jax.tree.map(lambda a, w, keep=keep, share=share: _lerp(a, w, keep, share), average, params)
    return PowerEMAState(jnp.asarray(time, jnp.uint32), averages)


def save(folder: str | Path, state: PowerEMAState) -> list[Path]:
    """Write one snapshot per average into ``folder``, atomically; returns their paths.

    Arrays are named by their path in the tree, as ``layers.0.weight``.

    Raises:
        InputError: before the first update, or two leaves with one name.
    """
    averages = ((Length.of(k), {n: _host(x) for n, x in _named(tree).items()}) for k, tree in state.averages.items())
    return save_averages(folder, averages, time=int(state.time))


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None, like: Tree = None) -> Tree:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns arrays by name, averages in float32; or a tree of the structure and dtypes of ``like``, whose leaves may be
    arrays or ``jax.ShapeDtypeStruct``. Source: Algorithm 3.

    Raises:
        InputError: nothing stored, a time or length that cannot be reconstructed, or names or shapes other than those
            of ``like``.
    """
    (snapshot,) = reconstruct_arrays(open_sources(folder), time=time, sigma_rels=[sigma_rel])
    arrays = {name: jnp.asarray(array) for name, array in snapshot.params.items()}
    if like is None:
        return arrays
    leaves = {name: (tuple(jnp.shape(x)), jnp.result_type(x)) for name, x in _named(like).items()}
    need, got = {n: shape for n, (shape, _) in leaves.items()}, {n: x.shape for n, x in arrays.items()}
    if differ := sorted(name for name in need.keys() | got.keys() if need.get(name) != got.get(name)):
        name = differ[0]
        raise InputError(
            f"the snapshots must have the arrays of like, got {name} {got.get(name, 'missing')} for "
            f"{need.get(name, 'none')} ({len(differ)} differ): give the parameters that were averaged"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[n].astype(dtype) for n, (_, dtype) in leaves.items()])


def _lengths(sigma_rels: Sequence[LengthLike]) -> list[Length]:
    if not len(sigma_rels):
        raise InputError(
            "sigma_rels must be one or more lengths, got none: (0.05, 0.10) lets you choose any afterwards"
        )
    return [Length.of(length) for length in sigma_rels]


def _check(time: Any, delta: Any) -> None:
    """Check numbers only: to read an array is to wait for the device."""
    if isinstance(time, int | float | np.number) and isinstance(delta, int | float | np.number):
        beta(0.1, t_next=float(time), t_delta=float(delta))


def _shares(length: Length, time: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
    """beta and 1 - beta, float32 0-d, the smaller with a small relative error. Source: Eq. 127, :meth:`Length.beta`.

    gamma is computed in float64 on the host. expm1 keeps the digits of 1 - beta that a difference would lose.
    """
    delta, time = (jnp.asarray(x, jnp.float32) for x in (delta, time))
    if not length.relative:
        rate = -log(2) / length.value
        share = jnp.expm1(rate * delta) / jnp.expm1(rate * time)
        return 1 - share, share
    exponent = (sigma_rel_to_gamma(length.value) + 1) * jnp.log1p(-delta / time)
    return jnp.exp(exponent), -jnp.expm1(exponent)


def _lerp(average: jax.Array, weight: Any, keep: jax.Array, share: jax.Array) -> jax.Array:
    """``lerp(average, weight, share)``, from the closer endpoint so that share 0 and 1 are exact; keep = 1 - share."""
    if not _averaged(average):
        return _copy(weight)
    if jnp.shape(weight) != average.shape:
        raise InputError(
            f"params must have the shapes of their averages, got {jnp.shape(weight)} for {average.shape}: init anew"
        )
    keep, share, weight = (jnp.asarray(x).astype(average.dtype) for x in (keep, share, weight))
    difference = weight - average
    return jnp.where(share < 0.5, average + share * difference, weight - keep * difference)


def _copy(x: Any) -> jax.Array:
    """A copy, also as the result of jit: two arrays that share memory cannot both be donated."""
    x = jnp.asarray(x)
    return jnp.array(x, dtype=jnp.promote_types(x.dtype, jnp.float32) if _averaged(x) else x.dtype, copy=True)


def _averaged(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) if _averaged(x) else np.asarray(x)


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, in order."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if (name := ".".join(map(_key, path))) in named:
            raise InputError(f"leaves must have one name each, got {name} twice: rename a key that has a dot")
        named[name] = leaf
    return named


def _key(key: Any) -> str:
    """An entry of a path: a dict's key, a sequence's index, an attribute's name."""
    return str(next((getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)), key))
