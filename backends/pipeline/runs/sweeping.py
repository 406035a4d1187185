"""Searching for the best setting of sampling: what is varied, and the order in which points are measured.

A domain is a range LOW:HIGH or a list of values. A search asks for a point and is told its figure, the lower the
better; it is deterministic, so processes that share a sweep take the same points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, inf, log, sqrt
from typing import Literal

import numpy as np

from edm2_core.errors import InputError

Search = Literal["auto", "grid", "golden", "gp"]
Point = tuple[float, ...]
Ask = Callable[[Point], float]
"""A point, in the order of the domains, to its figure."""
_GOLDEN = (sqrt(5) - 1) / 2
_NEAR = 0.1  # a golden section ends when the ends of its bracket differ by a tenth


@dataclass(frozen=True)
class Domain:
    """What is varied: ``values``, or all between ``low`` and ``high``."""

    name: str
    values: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, text: str, /) -> "Domain":
        """The domain of NAME=LOW:HIGH or NAME=A,B,C. Raises ValueError for other text."""
        name, equals, domain = text.partition("=")
        if not name or not equals:
            raise ValueError(text)
        if ":" in domain:
            low, high = map(float, domain.split(":"))
            if not -inf < low < high < inf:
                raise ValueError(text)
            return cls(name, (), low, high)
        return cls(name, tuple(map(float, domain.split(","))))

    @property
    def is_range(self) -> bool:
        return not self.values

    def spread(self, count: int, /) -> tuple[float, ...]:
        """Its values; of a range ``count`` of them, with equal ratios if it is positive."""
        if self.values:
            return self.values
        make = np.geomspace if self.low > 0 else np.linspace
        return tuple(round(float(x), 6) for x in make(self.low, self.high, count))

    def __str__(self) -> str:
        domain = f"{self.low:g}:{self.high:g}" if self.is_range else ",".join(f"{value:g}" for value in self.values)
        return f"{self.name}={domain}"


def search(domains: Sequence[Domain], ask: Ask, /, *, kind: Search = "auto", points: int = 7, grid: int = 9) -> None:
    """Ask for the figures of points until the search ends.

    Args:
        domains: what is varied, one or more.
        kind: grid: all combinations of the values, with ``grid`` values of each range; golden: a golden section of one
            range, which finds the minimum of a figure that first falls and then rises; gp: Bayesian optimization by a
            Gaussian process; auto: golden for one range, gp for several, else the grid.
        points: the most points of golden and gp.

    Raises:
        InputError: a golden section of anything but one range, fewer than two ``points`` or values in a ``grid``, or
            optuna is not installed.
    """
    for option, count in (("--points", points), ("--grid", grid)):
        if count < 2:
            raise InputError(f"{option} must be 2 or more, got {count}: leave it out for the usual number")
    ranges = [domain for domain in domains if domain.is_range]
    if kind == "auto":
        kind = "grid" if not ranges else "golden" if len(domains) == 1 else "gp"
    if kind == "golden" and (len(domains) != 1 or not ranges):
        raise InputError(
            f"--search golden is for one range, got {' '.join(map(str, domains))}: use --search gp, or vary one alone"
        )
    if kind == "gp":
        _bayesian(domains, ask, points)
    elif kind == "golden":
        _golden(domains[0], ask, points)
    else:
        for point in product(*(domain.spread(grid) for domain in domains)):
            ask(point)


def _golden(domain: Domain, ask: Ask, points: int) -> None:
    to, back = (log, exp) if domain.low > 0 else (float, float)
    figures: dict[float, float] = {}

    def figure(x: float) -> float:
        if x not in figures:
            figures[x] = ask((round(back(x), 6),))
        return figures[x]

    low, high = to(domain.low), to(domain.high)
    enough = _NEAR if domain.low > 0 else _NEAR * (high - low)
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while True:
        needed = sum(x not in figures for x in (inner, outer))
        if len(figures) + needed > points or high - low < enough:
            return
        if figure(inner) <= figure(outer):
            high, outer = outer, inner
            inner = high - _GOLDEN * (high - low)
        else:
            low, inner = inner, outer
            outer = low + _GOLDEN * (high - low)


def _bayesian(domains: Sequence[Domain], ask: Ask, points: int) -> None:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise InputError("--search gp needs optuna, which is not installed: pip install 'edm2[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: "optuna.Trial") -> float:
        point = []
        for d in domains:
            if d.is_range:
                point.append(round(trial.suggest_float(d.name, d.low, d.high, log=d.low > 0), 6))
            else:
                point.append(float(trial.suggest_categorical(d.name, d.values)))
        return ask(tuple(point))

    sampler = optuna.samplers.GPSampler(seed=0, n_startup_trials=max(2 * len(domains), 3))
    optuna.create_study(sampler=sampler).optimize(objective, n_trials=points)
