"""Power-function averages of weights, and the least-squares reconstruction of any of them after training.

An average of length sigma_rel over training time t has the profile

    p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t                                     (Eq. 119)

whose standard deviation is sigma_rel * t: the average reaches back a fixed share of the training so far.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                                                (Eq. 126)
    beta(t)     = (1 - dt / t)^(gamma + 1), the exact update                                               (Eq. 127)
    <p_a, p_b>  = (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b,  t_a <= t_b  (Eq. 151)

Time is in any unit, the same throughout; we count images. Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from typing import Any

import numpy as np

from .arrays import Array, from_host, is_array, namespace, scalars_too, to_host
from .errors import InputError

LONGEST = 12**-0.5  # sigma_rel at gamma = 0, the plain mean of all weights so far
_NEWTON_STEPS = 8


@scalars_too
def sigma_rel_to_gamma(s: Array, /) -> Array:
    """The exponent gamma >= 0 of an average of relative length ``s``. Elementwise. Source: Eq. 126, Algorithm 2.

    With v = 1 / (gamma + 2), Eq. 126 reads f(v) = v sqrt((1 - v) / (1 + v)) = s. On (0, 1/2] f is increasing and
    concave and f(v) <= v, so Newton's method from v = s climbs to the root without ever passing it; the eight steps
    reach rounding at every s. Departs from the paper: it finds the root of a cubic polynomial, which loses digits.

    Raises:
        InputError: ``s`` is outside (0, 0.2887].
    """
    _check_range(s, "sigma_rel", "within (0, 0.2887)", lambda x: (x > 0) & (x <= LONGEST * (1 + 1e-6)))
    xp = namespace(s)
    v = s
    for _ in range(_NEWTON_STEPS):
        f = v * xp.sqrt((1 - v) / (1 + v))
        v = v - (f - s) / (f * (1 / v - 1 / (1 - v * v)))
    return 1 / v - 2


@scalars_too
def gamma_to_sigma_rel(g: Array, /) -> Array:
    """The relative length of an average with exponent ``g`` >= 0. Elementwise. Source: Eq. 126."""
    _check_range(g, "gamma", "at least 0", lambda x: x >= -1e-5)
    return namespace(g).sqrt((g + 1) / (g + 3)) / (g + 2)


def beta(sigma_rel: float | Array, /, *, t_next: float | Array, t_delta: float | Array) -> Any:
    """How much of an average stays when time advances by ``t_delta`` to ``t_next``: avg = beta avg + (1 - beta) w.

    (1 - t_delta / t_next)^(gamma + 1), exact for any ``t_delta``; 0 at t_next == t_delta, so the first update copies.
    Source: Eq. 127. Broadcasts. Raises InputError where not 0 < t_delta <= t_next.
    """
    for name, t in (("t_delta", t_delta), ("t_next", t_next)):
        _check_range(t, name, "positive", lambda x: x > 0)
    ratio = t_delta / t_next
    _check_range(ratio, "t_delta / t_next", "at most 1", lambda x: x <= 1)
    return (1 - ratio) ** (sigma_rel_to_gamma(sigma_rel) + 1)


def profile(t: float | Array, /, *, end_time: float | Array, sigma_rel: float | Array) -> Any:
    """Response at time ``t`` of an average of length ``sigma_rel`` taken at ``end_time``; 0 outside [0, end_time].

    Integrates to 1; its unit is 1 / time. Broadcasts. Source: Eq. 119. Python numbers give a float.
    """
    return _host(_profile, t, end_time, sigma_rel)


def inner_product(*, time_a: Any, sigma_rel_a: Any, time_b: Any, sigma_rel_b: Any) -> Any:
    """Integral over time of the product of two profiles, in 1 / time. Broadcasts. Source: Eq. 151, in the form of
    ratios, which neither overflows nor underflows at any gamma. Python numbers give a float."""
    return _host(_inner_product, time_a, sigma_rel_a, time_b, sigma_rel_b)


def coefficients(*, in_time: Any, in_sigma_rel: Any, out_time: Any, out_sigma_rel: Any) -> Any:
    """Weights with which stored averages add up to others: average_out[j] = sum_i coefficients[i, j] * average_in[i].

    The least-squares fit of the output profile by the input profiles that end no later (later snapshots get 0), scaled
    to sum to 1. Computed in float64 on the host whatever the library; the minimum-norm answer where inputs repeat.

    Args:
        in_time, in_sigma_rel: when each stored average was taken and its length; shape [n_in], or broadcast to it.
        out_time, out_sigma_rel: the same of the averages wanted; shape [n_out], or broadcast to it.

    Returns:
        [n_in, n_out], in the library, dtype and device of ``in_sigma_rel``; NumPy float64 for lists and numbers.

    Source: Algorithm 3, Eq. 151. Departs from the paper: each column is divided by its sum, as published averages are.

    Raises:
        InputError: no inputs, a time that is not positive, a length outside (0, 0.2887), a target before every input.
    """
    t_in, s_in = _vectors(in_time, in_sigma_rel, "in")
    t_out, s_out = _vectors(out_time, out_sigma_rel, "out")
    unit = max(t_in.max(), t_out.max())
    t_in, t_out = t_in / unit, t_out / unit
    gram = _inner_product(t_in[:, None], s_in[:, None], t_in[None], s_in[None])
    target = _inner_product(t_in[:, None], s_in[:, None], t_out[None], s_out[None])
    scale = np.diagonal(gram) ** -0.5  # unit diagonal: short and long averages count alike in the cut of small values
    result = np.zeros_like(target)
    for end in np.unique(t_out):
        rows, columns = t_in <= end, t_out == end
        if not rows.any():
            raise InputError(
                f"a target must not lie before every snapshot, got {end * unit:g} with the first at "
                f"{t_in.min() * unit:g}: choose a later target"
            )
        among = gram[np.ix_(rows, rows)] * np.outer(scale[rows], scale[rows])
        wanted = target[np.ix_(rows, columns)] * scale[rows, None]
        fit = np.linalg.lstsq(among, wanted, rcond=len(among) * np.finfo(np.float64).eps)[0] * scale[rows, None]
        result[np.ix_(rows, columns)] = fit / fit.sum(axis=0)
    return from_host(result, like=in_sigma_rel)


def _vectors(time: Any, sigma_rel: Any, side: str) -> tuple[np.ndarray, np.ndarray]:
    times, lengths = np.broadcast_arrays(np.atleast_1d(to_host(time)), to_host(sigma_rel))
    if times.ndim != 1 or times.size == 0:
        raise InputError(
            f"{side}_time and {side}_sigma_rel must be one or more numbers in a row, got shape {times.shape}"
        )
    _check_range(times, f"{side}_time", "positive", lambda x: x > 0)
    return times, lengths


def _profile(t: np.ndarray, end_time: np.ndarray, sigma_rel: np.ndarray) -> np.ndarray:
    gamma, ratio = sigma_rel_to_gamma(sigma_rel), t / end_time
    inside = (ratio >= 0) & (ratio <= 1)
    return np.where(inside, (gamma + 1) / end_time * np.where(inside, ratio, 0) ** gamma, 0.0)


def _inner_product(time_a: Any, sigma_rel_a: Any, time_b: Any, sigma_rel_b: Any) -> np.ndarray:
    gamma_a, gamma_b = sigma_rel_to_gamma(sigma_rel_a), sigma_rel_to_gamma(sigma_rel_b)
    later, gamma_later = np.maximum(time_a, time_b), np.where(time_a < time_b, gamma_b, gamma_a)
    ratio = np.minimum(time_a, time_b) / later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**gamma_later / later


def _host(function: Any, *values: Any) -> Any:
    """Call a float64 NumPy function with arrays of any library; the first array says what goes back."""
    like = next((value for value in values if is_array(value)), None)
    result = function(*map(to_host, values))
    return float(result) if like is None and result.ndim == 0 else from_host(result, like=like)


def _check_range(values: Any, name: str, need: str, holds: Any) -> None:
    try:
        host = to_host(values)
    except TypeError:  # traced by a compiler: there is no value to check yet
        return
    if not (good := holds(host)).all():
        raise InputError(f"{name} must be {need}, got {host[~good].flat[0]:.6g}")
