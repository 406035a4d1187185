"""Averages while training goes on: pure functions of weights in a dict, in any array library.

    averages = start(weights)                                                  # of lengths 0.05 and 0.10
    averages = advance(averages, weights, t_next=images_seen, t_delta=batch)   # after an optimizer step, or every few

An update moves each average towards the weights by what it forgets, avg + (1 - beta) (w - avg), Eq. 127: exact at any
interval for weights that hold still in it. ``Length.half_life(images)`` is the length of a traditional average.
Source: arXiv 2312.02696 Section 3.1, Appendix C.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays import Array, cast, namespace, widened
from ..errors import InputError
from .lengths import Length, LengthLike

Averages = dict[LengthLike, dict[str, Array]]  # by length as it was given, then by name


def start(weights: Mapping[str, Array], /, *, sigma_rels: Sequence[LengthLike] = (0.05, 0.10)) -> Averages:
    """Averages that have seen nothing but ``weights``: one copy of them for each of the lengths ``sigma_rels``.

    A length is a sigma_rel or a :class:`Length`, and the key of its average. The first update (t_delta == t_next)
    replaces the copies. Dtype: that of each array, float32 where it is a narrower floating one. Source: Eq. 127 at
    t = dt.

    Raises:
        InputError: no lengths, or one outside (0, 0.2887).
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
    """The averages at ``t_next``, where ``weights`` held for the last ``t_delta``; the arguments stay as they are.

    Dtype: floating arrays that of the average, float32 or wider; all others are copied from ``weights``.
    Source: Eq. 127, with beta in float64.

    Raises:
        InputError: names or shapes that are not the averages', or not 0 < t_delta <= t_next.
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
    weight = cast(_values(weight), average)
    if share < 0.5:
        return average + share * (weight - average)
    return weight - (1 - share) * (weight - average) if share < 1 else _copy(weight)


def _copy(x: Array) -> Array:
    """In memory of its own: training may write into its weights, or give their memory away."""
    x = widened(_values(x)) if _averaged(x) else _values(x)
    return namespace(x).asarray(x, copy=True)


def _averaged(x: Array) -> bool:
    return bool(namespace(x).isdtype(x.dtype, "real floating"))


def _values(x: Any) -> Array:
    return x.detach() if hasattr(x, "detach") else x  # PyTorch would keep the graph of every update


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
