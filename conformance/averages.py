"""Oracles of SPEC EMA: averages as sums over training steps, and profiles in many digits."""

from typing import Any

import mpmath
import numpy as np

from edm2_core import ema
from edm2_core.ema import Length, LengthLike


def exact_sigma_rel(gamma: Any) -> Any:
    """Eq. 126 in mpmath's precision."""
    return mpmath.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def segment_weights(edges: np.ndarray, length: LengthLike, end: float) -> np.ndarray:
    """The integral of the profile over each interval between ``edges`` (starting at 0), cut off at ``end``."""
    length = Length.of(length)
    if length.relative:
        return np.diff(np.minimum(edges / end, 1.0) ** (ema.sigma_rel_to_gamma(length.value) + 1))
    rate, edges = np.log(2) / length.value, np.minimum(edges, end)
    return np.exp(-rate * (end - edges[1:])) * np.expm1(-rate * np.diff(edges)) / np.expm1(-rate * end)


def track(weights: np.ndarray, edges: np.ndarray, length: LengthLike) -> np.ndarray:
    """The average after each update, where weights [steps, ...] are constant from each of ``edges`` to the next."""
    length, average, history = Length.of(length), np.full(weights.shape[1:], np.nan), []
    for w, start, end in zip(weights, edges, edges[1:], strict=False):
        keep = length.beta(t_next=end, t_delta=end - start)
        average = w if keep == 0 else keep * average + (1 - keep) * w
        history.append(average)
    return np.stack(history)


def exact_gamma(sigma_rel: float) -> Any:
    """The gamma of a length, in mpmath's precision."""
    near = ema.sigma_rel_to_gamma(sigma_rel)
    return mpmath.findroot(lambda g: exact_sigma_rel(g) - mpmath.mpf(sigma_rel), (near, near * (1 + 1e-9) + 1e-9))


def exact_product(t_a: float, gamma_a: Any, t_b: float, gamma_b: Any) -> Any:
    """Eq. 151 in mpmath's precision."""
    if t_a > t_b:
        t_a, gamma_a, t_b, gamma_b = t_b, gamma_b, t_a, gamma_a
    reach = (mpmath.mpf(float(t_a)) / mpmath.mpf(float(t_b))) ** gamma_b / mpmath.mpf(float(t_b))
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * reach
