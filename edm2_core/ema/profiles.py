"""Profiles of averages, power-function and traditional: their lengths, their updates and their inner products.

An average of length sigma_rel over training time t has the profile

    p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t                                     (Eq. 119)

whose standard deviation is sigma_rel * t: the average reaches back a fixed share of the training so far.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                                                (Eq. 126)
    beta(t)     = (1 - dt / t)^(gamma + 1), the exact update                                               (Eq. 127)
    <p_a, p_b>  = (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b,  t_a <= t_b  (Eq. 151)

A traditional average of half-life h forgets at a constant rate. Started at 0 and corrected for that, it has

    p(tau; t) = k exp(-k (t - tau)) / (1 - exp(-k t)),   k = ln 2 / h
    beta(t)   = 1 - (1 - exp(-k dt)) / (1 - exp(-k t)), the exact update

Time is in any unit, the same throughout; we count images. Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from collections.abc import Iterable
from math import log
from typing import Any, NamedTuple, overload

import numpy as np

from ..arrays import Array, Numbers, from_host, is_array, namespace, scalars_too, to_host
from ..errors import InputError

LONGEST = 12**-0.5
"""sigma_rel at gamma = 0, the plain mean of all weights so far."""
_NEWTON_STEPS = 8


@scalars_too
def sigma_rel_to_gamma(s: Array, /) -> Array:
    """The exponent gamma >= 0 of an average of relative length ``s``, elementwise.

    Shapes: any, kept. Floats give floats. Source: Eq. 126, Algorithm 2. With v = 1 / (gamma + 2), Eq. 126 reads
    f(v) = v sqrt((1 - v) / (1 + v)) = s. On (0, 1/2] f is increasing and concave and f(v) <= v, so Newton's method from
    v = s approaches the root from below; eight steps reach rounding at every s. Departs from the paper, which finds the
    root of a cubic polynomial and loses digits.

    Raises:
        InputError: ``s`` is outside (0, 0.2887].

    >>> round(sigma_rel_to_gamma(0.10), 2)
    6.94
    """
    check_range(s, "sigma_rel", "within (0, 0.2887)", lambda x: (x > 0) & (x <= LONGEST * (1 + 1e-6)))
    xp = namespace(s)
    v = s
    for _ in range(_NEWTON_STEPS):
        f = v * xp.sqrt((1 - v) / (1 + v))
        v = v - (f - s) / (f * (1 / v - 1 / (1 - v * v)))
    return 1 / v - 2


@scalars_too
def gamma_to_sigma_rel(g: Array, /) -> Array:
    """The relative length sigma_rel of an average with exponent ``g``, elementwise.

    Shapes: any, kept. Floats give floats. Source: Eq. 126. Raises InputError where ``g`` is negative.
    """
    check_range(g, "gamma", "at least 0", lambda x: x >= -1e-5)
    return namespace(g).sqrt((g + 1) / (g + 3)) / (g + 2)


@overload
def beta(sigma_rel: float, /, *, t_next: float, t_delta: float) -> float: ...
@overload
def beta(sigma_rel: float | Array, /, *, t_next: float | Array, t_delta: float | Array) -> Any: ...
def beta(sigma_rel: Any, /, *, t_next: Any, t_delta: Any) -> Any:
    """How much of an average remains when time advances by ``t_delta`` to ``t_next``: avg = beta avg + (1 - beta) w.

    (1 - t_delta / t_next)^(gamma + 1), exact for any ``t_delta``; 0 at t_next == t_delta, so the first update copies.
    Shapes: broadcast. Floats give a float. Source: Eq. 127.

    Raises:
        InputError: ``sigma_rel`` is outside (0, 0.2887], or not 0 < t_delta <= t_next.

    >>> beta(0.05, t_next=128, t_delta=128)
    0.0
    """
    for name, t in (("t_delta", t_delta), ("t_next", t_next)):
        check_range(t, name, "positive", lambda x: x > 0)
    ratio = t_delta / t_next
    check_range(ratio, "t_delta / t_next", "at most 1", lambda x: x <= 1)
    return (1 - ratio) ** (sigma_rel_to_gamma(sigma_rel) + 1)


@scalars_too
def expm1(x: Array, /) -> Array:
    """exp(x) - 1, elementwise, without loss of digits near 0. Floats give floats."""
    return namespace(x).expm1(x)


@overload
def profile(t: float, /, *, end_time: float, sigma_rel: float) -> float: ...
@overload
def profile(t: Numbers, /, *, end_time: Numbers, sigma_rel: Numbers) -> Any: ...
def profile(t: Any, /, *, end_time: Any, sigma_rel: Any) -> Any:
    """Response at time ``t`` of an average of length ``sigma_rel`` taken at ``end_time``; 0 outside [0, end_time].

    It integrates to 1; its unit is 1 / time. Computed in float64 on the host. Shapes: broadcast. Returns: in the
    library, dtype and device of the first array; a float for numbers. Source: Eq. 119.

    >>> profile(0.5, end_time=1.0, sigma_rel=LONGEST)  # the plain mean weighs all times alike
    1.0
    """
    return _host(lambda t, end, s: Profile.power(end, s)(t), t, end_time, sigma_rel)


@overload
def inner_product(*, time_a: float, sigma_rel_a: float, time_b: float, sigma_rel_b: float) -> float: ...
@overload
def inner_product(*, time_a: Numbers, sigma_rel_a: Numbers, time_b: Numbers, sigma_rel_b: Numbers) -> Any: ...
def inner_product(*, time_a: Any, sigma_rel_a: Any, time_b: Any, sigma_rel_b: Any) -> Any:
    """Integral over time of the product of two profiles, in 1 / time.

    Computed in float64 on the host. Shapes: broadcast. Returns: in the library, dtype and device of the first array; a
    float for numbers. Source: Eq. 151, as ratios of times, which neither overflow nor underflow at any gamma.
    """
    return _host(
        lambda t_a, s_a, t_b, s_b: Profile.power(t_a, s_a) @ Profile.power(t_b, s_b),
        *(time_a, sigma_rel_a, time_b, sigma_rel_b),
    )


class Profile(NamedTuple):
    """Responses p(tau) ~ tau^gamma exp(rate tau) on [0, time], with integral 1; float64 NumPy arrays that broadcast.

    Rate 0 is a power function (Eq. 119); gamma 0 and rate 1 / T is the traditional average of time constant T. One form
    covers both, so any two have an inner product.
    """

    time: np.ndarray
    gamma: np.ndarray
    rate: np.ndarray

    @classmethod
    def power(cls, time: Any, sigma_rel: Any) -> "Profile":
        """Averages of relative length ``sigma_rel``, taken at ``time``; the two broadcast."""
        time, sigma_rel = np.broadcast_arrays(np.asarray(time, np.float64), np.asarray(sigma_rel, np.float64))
        return cls(time, sigma_rel_to_gamma(sigma_rel), np.zeros(time.shape))

    @classmethod
    def traditional(cls, time: Any, half_life: Any) -> "Profile":
        """Traditional averages of ``half_life``, taken at ``time``; the two broadcast."""
        time, half_life = np.broadcast_arrays(np.asarray(time, np.float64), np.asarray(half_life, np.float64))
        return cls(time, np.zeros(time.shape), log(2) / half_life)

    def __call__(self, t: np.ndarray, /) -> np.ndarray:
        """The responses at times ``t``, which broadcast with the fields; 0 outside [0, time]."""
        ratio = t / self.time
        inside = (ratio >= 0) & (ratio <= 1)
        power = np.where(inside, ratio, 0) ** self.gamma * np.exp(
            -self.rate * self.time * (1 - np.where(inside, ratio, 1))
        )
        return np.where(inside, power / self._mass, 0.0)

    def __matmul__(self, other: "Profile", /) -> np.ndarray:
        """Inner products, elementwise; Eq. 151 where rates are 0.

        With t_a <= t_b, (t_a / t_b)^gamma_b exp(-rate_b (t_b - t_a)) t_a M / (mass_a mass_b), M the mass of the product
        up to t_a, in units of t_a.
        """
        first = self.time <= other.time
        early, late = (
            Profile(*(np.where(which, x, y) for x, y in zip(self, other, strict=True))) for which in (first, ~first)
        )
        both = _mass(early.gamma + late.gamma, (early.rate + late.rate) * early.time)
        reach = (early.time / late.time) ** late.gamma * np.exp(-late.rate * (late.time - early.time))
        product: np.ndarray = reach * early.time * both / (early._mass * late._mass)
        return product

    def outer(self, other: "Profile", /) -> np.ndarray:
        """Inner products [n, m] of the responses [n] of this profile with the responses [m] of ``other``."""
        return self.take((slice(None), None)) @ other.take(None)

    @property
    def _mass(self) -> np.ndarray:
        mass: np.ndarray = self.time * _mass(self.gamma, self.rate * self.time)
        return mass

    @classmethod
    def stack(cls, profiles: Iterable["Profile"], /) -> "Profile":
        """Several profiles of one response each as one profile of a row of responses."""
        return cls(*(np.array(field, np.float64) for field in zip(*profiles, strict=True)))

    def take(self, index: Any, /) -> "Profile":
        """The profile with every field indexed by ``index``, which may select responses or add axes to broadcast."""
        return Profile(*(x[index] for x in self))


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
_REACH = 40.0  # e-foldings: what lies beyond is below float64's rounding


def _mass(gamma: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Integral of u^gamma exp(-z (1 - u)) over [0, 1].

    In closed form at z = 0 and at gamma = 0. Elsewhere by quadrature over the part where the integrand is not
    negligible, with u = 1 - w (1 - v^4), which makes u^gamma smooth at u = 0.
    """
    gamma, z = np.broadcast_arrays(gamma, z)
    small = z < 1e-8  # the exponential changes less here than the power's rounding
    result = np.where(small, 1 / (gamma + 1), -np.expm1(-z) / np.where(small, 1, z))
    if (mixed := ~small & (gamma > 0)).any():
        g, rate = gamma[mixed][:, None], z[mixed][:, None]
        width = np.minimum(1, _REACH / (g + rate))
        back = width * (1 - _NODES**4)
        values = np.exp(g * np.log1p(-back) - rate * back) * 4 * width * _NODES**3
        result[mixed] = values @ _WEIGHTS
    return result


def _host(function: Any, *values: Any) -> Any:
    """Call a float64 NumPy function with arrays of any library; the result is in that of the first array."""
    like = next((value for value in values if is_array(value)), None)
    result = function(*map(to_host, values))
    return float(result) if like is None and result.ndim == 0 else from_host(result, like=like)


def check_range(values: Any, name: str, need: str, holds: Any) -> None:
    """Raise InputError, "``name`` must be ``need``", unless ``holds`` of every value (an array, or a number)."""
    try:
        host = to_host(values)
    except TypeError:  # a compiler is tracing, and there are no values to check
        return
    if not (good := holds(host)).all():
        raise InputError(f"{name} must be {need}, got {host[~good].flat[0]:.6g}")
