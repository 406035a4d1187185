"""Choosing the averaging length by any measure of the weights: a validation loss, an accuracy, a score of samples.

For averages of any model, in a folder of snapshots. A port makes the weights into its own model: see ``best_length`` in
``backends/{torch,jax,mlx}/ema.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.reconstruct import WORST_ERROR, reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import Source, open_sources
from backends.pipeline.metrics.extractors import own_function
from edm2_core.errors import InputError

from .sweeping import Domain, Point, search

RANGE = (0.01, 0.25)
"""The lengths that are searched."""
_CANDIDATES = 64


@dataclass(frozen=True)
class BestLength:
    """The best length, its ``value``, the lowest, and the values of all lengths that were measured, by length."""

    sigma_rel: float
    value: float
    values: dict[float, float]

    def __str__(self) -> str:
        """A line for each length, the best one marked."""
        marks = {self.sigma_rel: " *"}
        return "\n".join(f"{x:<6.4f}  {value:10.6g}{marks.get(x, '')}" for x, value in self.values.items())


def best_length(
    folder: str | Path,
    measure: Callable[[Snapshot], float],
    /,
    *,
    sigma_rels: Sequence[float] = (),
    points: int = 9,
    time: int | None = None,
) -> BestLength:
    """Measure averages of several lengths, reconstructed from snapshots in ``folder``; the lowest value is the best.

    Args:
        folder: snapshots, as :func:`~backends.pipeline.checkpoints.sources.open_sources` takes them.
        measure: called with one average at a time.
        sigma_rels: the lengths to measure. None given: a golden section between 0.01 and 0.25, for values that first
            fall with the length and then rise. Lengths that the snapshots cannot give, because the predicted error of
            the reconstruction exceeds 0.5, are left out.
        points: the most lengths that the golden section measures.
        time: that of the averages; None: of the last snapshot.

    Raises:
        InputError: no snapshots, no length that they can give, fewer than two points, or a value that is not finite.
    """
    if points < 2:
        raise InputError(f"points must be 2 or more, got {points}: 9 find a length to a tenth")
    sources, values = open_sources(folder), dict[float, float]()

    def ask(point: Point) -> float:
        (length,) = point
        (snapshot,) = reconstruct(sources, time=time, sigma_rels=[length])
        return values.setdefault(length, checked(measure(snapshot), length))

    if sigma_rels:
        domain = Domain("sigma-rel", tuple(reachable(sources, sigma_rels, time=time)))
    else:
        usable = reachable(sources, [float(x) for x in np.geomspace(*RANGE, _CANDIDATES)], time=time)
        domain = (
            Domain("sigma-rel", (), usable[0], usable[-1]) if len(usable) > 1 else Domain("sigma-rel", (usable[0],))
        )
    search([domain], ask, points=points)
    best = min(values, key=lambda length: (values[length], length))
    return BestLength(best, values[best], dict(sorted(values.items())))


def reachable(sources: Sequence[Source], sigma_rels: Sequence[float], /, *, time: int | None = None) -> list[float]:
    """The lengths, in order, whose averages the sources can give with a predicted error of 0.5 at most.

    Raises:
        InputError: none of them, or a length outside (0, 0.2887].
    """
    lengths = sorted(sigma_rels)
    error = Combination.of(sources, time=time, sigma_rels=lengths).error.profile
    if usable := [length for length, e in zip(lengths, error, strict=True) if e <= WORST_ERROR]:
        return usable
    raise InputError(
        f"snapshots must be close enough to give the lengths, got a predicted error of {min(error):.2f} at best: store "
        "averages more often, and of two lengths"
    )


def checked(value: float, length: float, /) -> float:
    """``value`` as a number. Raises InputError where it is not finite, which nothing can be compared with."""
    number = float(value)
    if not isfinite(number):
        raise InputError(f"a metric must be a finite number, got {number} for sigma_rel {length:g}: correct the metric")
    return number


def own_metric(name: str, /) -> Callable[[Snapshot], float]:
    """The MODULE:FUNCTION called ``name``, from the weights by name, NumPy arrays, to a number.

    Raises:
        InputError: it cannot be imported; where it is called: it returns no number.
    """
    metric = own_function(name, what="a metric")

    def measure(snapshot: Snapshot) -> float:
        value = metric(dict(snapshot.params))
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} must return a number, got {type(value).__name__}: correct it") from error

    return measure
