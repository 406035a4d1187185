"""Averages of any pytree of weights, their snapshots, and averages of any other length after training.

    optimizer = optax.chain(optax.adam(1e-3), power_ema(t_delta=batch))    # last: it averages the updated weights
    ...
    save("snapshots", opt_state[-1])                                       # at intervals
    params = reconstruct("snapshots", sigma_rel=0.13, like=params)         # after training, any length
    best_length("snapshots", like=params, metric=validation_loss)          # or the best by your own function

or, in a loop without optax or every few steps:

    state = init(params)                                                   # sigma_rel 0.05 and 0.10
    state = update(state, params, time=images_seen, delta=batch)           # under jit or not

Averages are float32 or complex64, or wider where weights are; expm1 and log1p compute 1 - beta with a relative error
of a few parts in 10^7 however small it is. Averages share no memory with the parameters: a step may donate both.
Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from backends.pipeline.checkpoints.averages import ALONE, Processes, save_gathered
from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_arrays
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.runs.best_length import BestLength
from backends.pipeline.runs.best_length import best_length as best_measured
from edm2_core.ema import Length, LengthLike, StorageDtype, sigma_rel_to_gamma
from edm2_core.ema.clock import LATEST, start_time
from edm2_core.errors import InputError

from . import clocks
from . import device as devices

Tree = Any  # a pytree of arrays


class PowerEMAState(NamedTuple):
    """A pytree: the clock, and the averages by the text :attr:`~edm2_core.ema.Length.key` of their lengths, as in
    ``averages["0.05"]`` or ``["HalfLife(2000.0)"]``.

    ``clock`` is the time in two uint32, [2], the lower half first, because JAX has no wider integers by default. It is
    a NumPy array until the state has gone through jit. Averages have the structure of the parameters.
    """

    clock: Any
    averages: dict[str, Tree]

    @property
    def time(self) -> int:
        """The time of the last update, below 2^53; outside jit only. Raises InputError where an update inside jit was
        given a wrong time."""
        if (time := clocks.number(self.clock)) >= LATEST:
            raise InputError(
                "time - delta must be the time of the last update, got another inside jit, so the averages are NaN: "
                "go back to an earlier state; delta is the time since the last update, and start= is for a history"
            )
        return time


def power_ema(
    sigma_rels: Sequence[LengthLike] = (0.05, 0.10), *, t_delta: int | None = None, start: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Averages of the updated parameters; the updates themselves pass unchanged. Last in a chain.

    Args:
        sigma_rels: relative lengths; ``Length.half_life(images)`` for a traditional average.
        t_delta: by how much each update advances the clock: the images of a batch. None: it comes with each call,
            ``optimizer.update(gradients, state, params, t_delta=...)``, which takes precedence over the one given here.
            A call may also give ``time=``, the clock after it, alone or as a check.
        start: the time at init; see :func:`init`.

    Source: Eq. 127. Dtypes: as :func:`init`.

    Raises:
        InputError: a length outside (0, 0.2887), or none; in an update without params, without t_delta and time, or
            as :func:`update`.
    """

    def begin(params: Tree) -> PowerEMAState:
        return init(params, sigma_rels=sigma_rels, start=start)

    def advance(
        updates: Tree,
        state: PowerEMAState,
        params: Tree = None,
        *,
        t_delta: Any = t_delta,
        time: Any = None,
        **_: Any,
    ) -> tuple[Tree, PowerEMAState]:
        if params is None:
            raise InputError("power_ema averages parameters, got none: call optimizer.update(updates, state, params)")
        if t_delta is None and time is None:
            raise InputError("power_ema needs t_delta, got none: give it here or with each update")
        clock = state.clock
        now = clocks.plus(clock, clocks.words(t_delta)) if time is None else clocks.words(time)
        delta = clocks.since(clock, now) if t_delta is None else clocks.words(t_delta)
        return updates, _advanced(state, optax.apply_updates(params, updates), now, delta)

    _lengths(sigma_rels)
    return optax.GradientTransformationExtraArgs(begin, advance)


def init(params: Tree, *, sigma_rels: Sequence[LengthLike] = (0.05, 0.10), start: int = 0) -> PowerEMAState:
    """The averages before the first update: a copy of ``params`` for each length.

    With ``start`` 0, the first update replaces them by the weights: what was before does not count, also when weights
    are fine-tuned. With another time, ``params`` count as the average until then: one that goes on from pretraining.

    Dtype: that of each leaf, float32 or complex64 where it is narrower. Leaves of other types, such as counters and
    PRNG keys, are not averaged: they are copied. Raises InputError as :func:`power_ema`, and for a leaf that is no
    array.
    """
    for name, leaf in _named(params).items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise InputError(f"leaves must be arrays, got {type(leaf).__name__} at {name}: leave it out of params")
    averages = {length.key: jax.tree.map(_copy, params) for length in _lengths(sigma_rels)}
    return PowerEMAState(clocks.words(start_time(start)), averages)


def update(state: PowerEMAState, params: Tree, *, time: Any, delta: Any) -> PowerEMAState:
    """The averages at ``time``, where ``params`` were the weights for the last ``delta``. Source: Eq. 127, which is
    exact for any interval.

    ``time`` and ``delta`` are whole numbers below 2^53 or arrays of them, traced or not. Leaves that are not averaged
    are copied.

    Raises:
        InputError: other shapes than those averaged; or ``time - delta`` is not the time of the last update. Inside
            jit, where it cannot be raised, a wrong time makes the averages NaN, and :attr:`PowerEMAState.time` and
            :func:`save` raise it.
    """
    return _advanced(state, params, clocks.words(time), clocks.words(delta))


def _advanced(state: PowerEMAState, params: Tree, time: Any, delta: Any) -> PowerEMAState:
    clock = clocks.checked(state.clock, time, delta)
    wrong = None if isinstance(clock, np.ndarray) else clock[1] >= LATEST >> 32
    averages = {}
    for key, average in state.averages.items():
        keep, share = _shares(Length.of(key), clocks.as_float(time), clocks.as_float(delta))
        if wrong is not None:
            keep, share = (jnp.where(wrong, jnp.nan, x) for x in (keep, share))
        averages[key] = jax.tree.map(lambda a, w, keep=keep, share=share: _lerp(a, w, keep, share), average, params)
    return PowerEMAState(clock, averages)


def save(folder: str | Path, state: PowerEMAState, *, dtype: StorageDtype = "float16") -> list[Path]:
    """Write one snapshot per average into ``folder``, atomically; returns their paths.

    Arrays are named by their path in the tree, as ``layers.0.weight``. Averages are stored in ``dtype``, or in float32
    where it cannot hold them; other leaves as they are. Where processes hold parts of the arrays, all must call it:
    each array is gathered once, and the first process writes.

    Raises:
        InputError: before the first update; a wrong time inside jit; weights that are not finite; two leaves with one
            name; or a failed write.
    """
    named = {Length.of(key): _named(tree) for key, tree in state.averages.items()}
    first = next(iter(named.values()))
    kept = {name: _host(leaf) for name, leaf in first.items() if not _averaged(leaf)}
    gathered = ((s, name, _host(x)) for s, leaves in named.items() for name, x in leaves.items() if _averaged(x))
    several = Processes(jax.process_index(), lambda flag: bool(multihost_utils.broadcast_one_to_all(np.array(flag))))
    processes = several if jax.process_count() > 1 else ALONE
    return save_gathered(folder, gathered, processes, time=state.time, kept=kept, dtype=dtype)


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None, like: Tree = None) -> Tree:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns arrays by name, averages in float32; or a tree of the structure and dtypes of ``like``, whose leaves may be
    arrays or ``jax.ShapeDtypeStruct``. Source: Algorithm 3.

    Raises:
        InputError: nothing stored, a time or length that cannot be reconstructed, or names or shapes other than those
            of ``like``.
    """
    (snapshot,) = reconstruct_arrays(open_sources(folder), time=time, sigma_rels=[sigma_rel])
    return _as_tree(snapshot, like)


def best_length(
    folder: str | Path,
    *,
    like: Tree,
    metric: Callable[[Tree], Any],
    sigma_rels: Sequence[float] = (),
    points: int = 9,
    time: int | None = None,
) -> BestLength:
    """The length whose average has the lowest ``metric``, such as a validation loss, and the values of all measured.

    ``metric`` is called with an average, a tree like ``like``, and returns a number or an array of one element; return
    the negative of what should be high. Other arguments and InputError as
    :func:`~backends.pipeline.runs.best_length.best_length`; and as :func:`reconstruct`.
    """

    def measure(snapshot: Snapshot) -> float:
        return float(metric(_as_tree(snapshot, like)))

    return best_measured(folder, measure, sigma_rels=sigma_rels, points=points, time=time)


def _as_tree(snapshot: Snapshot, like: Tree) -> Tree:
    arrays = {name: jnp.asarray(array) for name, array in snapshot.params.items()}
    if like is None:
        return arrays
    leaves = _named(like)
    need, got = {n: _stored_shape(x) for n, x in leaves.items()}, {n: x.shape for n, x in arrays.items()}
    if differ := sorted(name for name in need.keys() | got.keys() if need.get(name) != got.get(name)):
        name = differ[0]
        raise InputError(
            f"the snapshots must have the arrays of like, got {name} {got.get(name, 'missing')} for "
            f"{need.get(name, 'none')} ({len(differ)} differ): give the parameters that were averaged"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [_as_leaf(arrays[n], x) for n, x in leaves.items()])


def _stored_shape(like: Any) -> tuple[int, ...]:
    return jax.eval_shape(jax.random.key_data, like).shape if _is_array_of_keys(like) else tuple(jnp.shape(like))


def _as_leaf(stored: jax.Array, like: Any) -> jax.Array:
    """What is stored of a leaf, in the dtype of ``like``."""
    if _is_array_of_keys(like):
        keys: jax.Array = jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))
        return keys
    return stored.astype(jnp.result_type(like))


def _is_array_of_keys(x: Any) -> bool:
    return hasattr(x, "dtype") and _is_key(x)


def _lengths(sigma_rels: Sequence[LengthLike]) -> list[Length]:
    if not len(sigma_rels):
        raise InputError(
            "sigma_rels must be one or more lengths, got none: (0.05, 0.10) lets you choose any afterwards"
        )
    return [Length.of(length) for length in sigma_rels]


def _shares(length: Length, time: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """beta and 1 - beta, float32 0-d, the smaller with a small relative error. Source: Eq. 127, :meth:`Length.beta`.

    gamma is computed in float64 on the host. expm1 keeps the digits of 1 - beta that a difference would lose.
    """
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
    real = average.real.dtype  # of a complex average, the dtype of its parts
    keep, share, weight = keep.astype(real), share.astype(real), jnp.asarray(weight).astype(average.dtype)
    difference = weight - average
    return jnp.where(share < 0.5, average + share * difference, weight - keep * difference)


def _copy(x: Any) -> jax.Array:
    """A copy, also as the result of jit: two arrays that share memory cannot both be donated."""
    x = jnp.asarray(x)
    return jnp.array(x, dtype=jnp.promote_types(x.dtype, jnp.float32) if _averaged(x) else None, copy=True)


def _averaged(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _host(x: Any) -> np.ndarray:
    return devices.gathered(jax.random.key_data(x) if _is_key(x) else x)


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
