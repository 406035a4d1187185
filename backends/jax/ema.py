"""Averages of any pytree, snapshots of them, and any other length afterwards.

    optimizer = optax.chain(optax.adam(1e-3), power_ema(t_delta=batch))    # last, so that it sees what weights become
    ...
    save("snapshots", opt_state[-1])                                       # now and then
    params = reconstruct("snapshots", sigma_rel=0.13, like=params)         # after training, any length

or, in a loop without optax or every few steps:

    state = init(params)                                                   # sigma_rel 0.05 and 0.10
    state = update(state, params, time=images_seen, delta=batch)           # inside jit or out of it

All is computed in float32 (or wider, where weights are): with expm1 and log1p, what an update takes from the weights is
right to a few parts in 10^7, however little it is. Nothing here is of one memory with the parameters, so a step may be
given both to overwrite. Source: arXiv 2312.02696 Section 3, Appendix C.
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
from edm2_core.ema import HalfLife, as_length, beta, sigma_rel_to_gamma
from edm2_core.errors import InputError

Tree = Any  # a pytree of arrays


class PowerEMAState(NamedTuple):
    """A pytree: the clock, and the averages by length in text, as in ``averages["0.05"]`` or ``["HalfLife(2000.0)"]``.

    ``time`` is a uint32, whole numbers below 2^32. Averages have the structure of the parameters.
    """

    time: jax.Array
    averages: dict[str, Tree]


def power_ema(
    sigma_rels: Sequence[float] = (0.05, 0.10), *, t_delta: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Average the parameters that updates lead to; the updates pass unchanged. Last in a chain.

    Args:
        sigma_rels: relative lengths; ``HalfLife(images)`` for a traditional average.
        t_delta: by how much each update advances the clock, as the images of a batch; None: given with each call,
            ``optimizer.update(gradients, state, params, t_delta=...)``, which also goes before the one given here.

    Source: Eq. 127. Dtypes: as :func:`init`.

    Raises:
        InputError: a length outside (0, 0.2887), or none; in an update without params or t_delta, or one below 1.
    """

    def start(params: Tree) -> PowerEMAState:
        return init(params, sigma_rels=sigma_rels)

    def follow(
        updates: Tree, state: PowerEMAState, params: Tree = None, *, t_delta: Any = t_delta, **_: Any
    ) -> tuple[Tree, PowerEMAState]:
        if params is None:
            raise InputError("power_ema averages parameters, got none: call optimizer.update(updates, state, params)")
        if t_delta is None:
            raise InputError("power_ema needs t_delta, got none: give it here or with each update")
        _check(t_delta, t_delta)
        time = state.time + jnp.asarray(t_delta, jnp.uint32)
        return updates, update(state, optax.apply_updates(params, updates), time=time, delta=t_delta)

    _check_lengths(sigma_rels)
    return optax.GradientTransformationExtraArgs(start, follow)


def init(params: Tree, *, sigma_rels: Sequence[float] = (0.05, 0.10)) -> PowerEMAState:
    """Averages that have seen nothing but ``params``: a copy for each length. The first update replaces them.

    Dtype: that of each leaf, float32 where it is a narrower floating one. Raises InputError as :func:`power_ema`.
    """
    _check_lengths(sigma_rels)
    averages = {repr(as_length(s)): jax.tree.map(_copy, params) for s in sigma_rels}
    return PowerEMAState(jnp.zeros((), jnp.uint32), averages)


def update(state: PowerEMAState, params: Tree, *, time: Any, delta: Any) -> PowerEMAState:
    """The averages at ``time``, where ``params`` held for the last ``delta``; any interval is exact (Eq. 127).

    ``time`` and ``delta`` may be numbers, arrays or traced. Leaves that are not floating are copied from ``params``.

    Raises:
        InputError: other shapes than those averaged; unless 0 < delta <= time, where they are numbers (with arrays,
            averages become NaN).
    """
    _check(time, delta)
    averages = {}
    for length, average in state.averages.items():
        stay, go = _shares(as_length(length), time, delta)
        averages[length] = jax.tree.map(lambda a, w, stay=stay, go=go: _moved(a, w, stay, go), average, params)
    return PowerEMAState(jnp.asarray(time, jnp.uint32), averages)


def save(folder: str | Path, state: PowerEMAState) -> list[Path]:
    """Write one snapshot per average into ``folder``, atomically; returns their paths.

    Arrays are named by their path in the tree, as ``layers.0.weight``.

    Raises:
        InputError: before the first update, or two leaves with one name.
    """
    averages = ((as_length(s), {n: _host(x) for n, x in _named(tree).items()}) for s, tree in state.averages.items())
    return save_averages(folder, averages, time=int(state.time))


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None, like: Tree = None) -> Tree:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns arrays by name, averages in float32; or a tree of the structure and dtypes of ``like``, whose leaves may be
    arrays or ``jax.ShapeDtypeStruct``. Source: Algorithm 3.

    Raises:
        InputError: nothing stored, a time or length that cannot be had, or names or shapes other than of ``like``.
    """
    (snapshot,) = reconstruct_arrays(folder, nimg=time, sigma_rels=[sigma_rel])
    arrays = {name: jnp.asarray(array) for name, array in snapshot.params.items()}
    if like is None:
        return arrays
    leaves = {name: (tuple(jnp.shape(x)), jnp.result_type(x)) for name, x in _named(like).items()}
    need, got = {n: shape for n, (shape, _) in leaves.items()}, {n: x.shape for n, x in arrays.items()}
    if odd := sorted(name for name in need.keys() | got.keys() if need.get(name) != got.get(name)):
        name = odd[0]
        raise InputError(
            f"the snapshots must have the arrays of like, got {name} {got.get(name, 'missing')} for "
            f"{need.get(name, 'none')} ({len(odd)} differ): give the parameters that were averaged"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[n].astype(dtype) for n, (_, dtype) in leaves.items()])


def _check_lengths(sigma_rels: Sequence[float]) -> None:
    if not len(sigma_rels):
        raise InputError(
            "sigma_rels must be one or more lengths, got none: (0.05, 0.10) lets you choose any afterwards"
        )
    for length in sigma_rels:
        as_length(length)


def _check(time: Any, delta: Any) -> None:
    """Only of numbers: to look at an array would wait for the device."""
    if isinstance(time, int | float | np.number) and isinstance(delta, int | float | np.number):
        beta(0.1, t_next=float(time), t_delta=float(delta))


def _shares(length: float, time: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
    """beta and 1 - beta, float32 0-d, the smaller with a small relative error. Source: Eq. 127.

    gamma in float64 on the host. beta itself is too near 1 to be subtracted from it: expm1 gives the difference.
    """
    delta, time = (jnp.asarray(x, jnp.float32) for x in (delta, time))
    if isinstance(length, HalfLife):
        rate = -log(2) / length
        go = jnp.expm1(rate * delta) / jnp.expm1(rate * time)
        return 1 - go, go
    exponent = (sigma_rel_to_gamma(length) + 1) * jnp.log1p(-delta / time)
    return jnp.exp(exponent), -jnp.expm1(exponent)


def _moved(average: jax.Array, weight: Any, stay: jax.Array, go: jax.Array) -> jax.Array:
    """From ``average`` the part ``go`` of the way to ``weight``, measured from the nearer end: exact at both."""
    if not _averaged(average):
        return _copy(weight)
    if jnp.shape(weight) != average.shape:
        raise InputError(
            f"params must have the shapes of their averages, got {jnp.shape(weight)} for {average.shape}: init anew"
        )
    stay, go, weight = (jnp.asarray(x).astype(average.dtype) for x in (stay, go, weight))
    way = weight - average
    return jnp.where(go < 0.5, average + go * way, weight - stay * way)


def _copy(x: Any) -> jax.Array:
    """An array of its own, also as the result of jit: what shares memory cannot be donated twice."""
    x = jnp.asarray(x)
    return jnp.array(x, dtype=jnp.promote_types(x.dtype, jnp.float32) if _averaged(x) else x.dtype, copy=True)


def _averaged(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) if _averaged(x) else np.asarray(x)


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, in order."""
    found = [(".".join(map(_key, path)), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    named = dict(found)
    if len(named) < len(found):
        twice = next(name for i, (name, _) in enumerate(found) if name in dict(found[:i]))
        raise InputError(f"leaves must have one name each, got {twice} twice: rename a key that has a dot")
    return named


def _key(key: Any) -> str:
    """An entry of a path: a dict's key, a sequence's index, an attribute's name."""
    found = (getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field))
    return str(next(found, key))
