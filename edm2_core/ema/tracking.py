"""Averages of weights during training: pure functions of weights in a dict, in any array library.

    averages = start(weights)                                                  # of lengths 0.05 and 0.10
    averages = advance(averages, weights, t_next=images_seen, t_delta=batch)   # after an optimizer step, or every few

An update is avg + (1 - beta) (w - avg), Eq. 127. It is exact at any interval if the weights do not change within it.
``Length.half_life(images)`` is the length of a traditional average. Source: arXiv 2312.02696 Section 3.1, Appendix C.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..arrays import Array, in_dtype_of, namespace, widened
from ..errors import InputError
from .lengths import Length, LengthLike

Averages = dict[LengthLike, dict[str, Array]]
"""By length as it was given, then by name."""


def start(weights: Mapping[str, Array], /, *, sigma_rels: Sequence[LengthLike] = (0.05, 0.10)) -> Averages:
    """The averages before training: a copy of ``weights`` for each length.

    Args:
        weights: arrays by name, of any shapes.
        sigma_rels: the lengths to track, each a sigma_rel or a :class:`Length`; they are the keys of the averages.

    Returns:
        By length, then by name: float32 copies of narrower floating arrays (complex64 of complex ones), and copies in
        their own dtype of all others. The first update (t_delta == t_next) replaces them.

    Source: Eq. 127 at t = dt.

    Raises:
        InputError: no lengths, or one outside (0, 0.2887].

    >>> import numpy as np
    >>> averages = start({"w": np.zeros(2)}, sigma_rels=(0.05,))
    >>> advance(averages, {"w": np.ones(2)}, t_next=128, t_delta=128)[0.05]["w"]
    array([1., 1.])
    """
    if not len(sigma_rels):
        raise InputError(
            "sigma_rels must be one or more lengths, got none: (0.05, 0.10) lets you choose any afterwards"
        )
    for length in sigma_rels:
        Length.of(length)
    return {length: {name: _copy(array) for name, array in weights.items()} for length in sigma_rels}


def advance(
    averages: Mapping[LengthLike, Mapping[str, Array]],
    weights: Mapping[str, Array],
    /,
    *,
    t_next: float,
    t_delta: float,
) -> Averages:
    """The averages at time ``t_next``, updated by ``weights``, which held for the last ``t_delta``.

    Args:
        averages: what :func:`start` or :func:`advance` returned; it is not changed.
        weights: arrays by name, of the names and shapes of the averages.
        t_next: images seen so far, those of this update included.
        t_delta: images seen since the last update.

    Returns:
        New averages: floating arrays in the dtype of the average, float32 or wider; all others copied from ``weights``.

    Source: Eq. 127, with beta in float64.

    Raises:
        InputError: ``weights`` differ in names or shapes from the averages, or not 0 < t_delta <= t_next.
    """
    check_alike(averages, weights)
    shares = {length: 1 - Length.of(length).beta(t_next=t_next, t_delta=t_delta) for length in averages}
    return {
        length: {name: _lerp(array, weights[name], shares[length]) for name, array in average.items()}
        for length, average in averages.items()
    }


def _lerp(average: Array, weight: Array, share: float) -> Array:
    """``lerp(average, weight, share)``, computed from the closer endpoint so that share 0 and 1 are exact."""
    if not _averaged(average):
        return _copy(weight)
    average = widened(average)
    weight = in_dtype_of(average, _values(weight))
    if share < 0.5:
        return average + share * (weight - average)
    return weight - (1 - share) * (weight - average) if share < 1 else _copy(weight)


def _copy(x: Array) -> Array:
    """A copy in memory of its own, because training may overwrite or donate the memory of its weights."""
    x = widened(_values(x)) if _averaged(x) else _values(x)
    return namespace(x).asarray(x, copy=True)


def _averaged(x: Array) -> bool:
    return bool(namespace(x).isdtype(x.dtype, ("real floating", "complex floating")))


def _values(x: Array) -> Array:
    detach = getattr(x, "detach", None)  # PyTorch would keep the graph of every update
    return x if detach is None else cast(Array, detach())


def check_alike(averages: Mapping[Any, Mapping[str, Array]], weights: Mapping[str, Array]) -> None:
    """Raise InputError, naming the first that differs, unless ``weights`` have the names and shapes of all averages."""
    for average in averages.values():
        if odd := sorted(average.keys() ^ weights.keys()):
            side = "weights lack" if odd[0] in average else "averages lack"
            raise InputError(
                f"weights must have the names of the averages, but the {side} {odd[0]} ({len(odd)} differ): "
                "start anew with these weights, or give those that were averaged"
            )
        for name, array in average.items():
            if (got := tuple(weights[name].shape)) != (need := tuple(array.shape)):
                raise InputError(f"{name} must have the shape of its average {need}, got {got}: start anew with it")
