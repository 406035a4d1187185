"""Reconstruction of an average of any length from stored averages, by least squares, and its error.

With G the inner products of the stored profiles and b those with the wanted one, the coefficients solve G x = b
(Algorithm 3). With snapshots sorted by time, those up to any target are a leading block of G, and their Cholesky factor
and its inverse are leading blocks too: one factorization serves all targets. Where stored profiles repeat each other,
small eigenvalues of G are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, cast, overload

import numpy as np

from ..arrays import A, Numbers, from_host, to_host
from ..errors import InputError
from .lengths import Length, LengthLike
from .profiles import Profile, check_range

_EPS = np.finfo(np.float64).eps
_INDEPENDENT = 1e-6  # relative distance to the span of earlier profiles, below which G's rounding hides a profile
StorageDtype = Literal["float16", "bfloat16", "float32"]
STORAGE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}
"""Machine epsilon of the dtypes that snapshots are stored in."""
Lengths = LengthLike | Sequence[LengthLike]


@overload
def coefficients(*, in_time: Numbers, in_sigma_rel: A, out_time: Numbers, out_sigma_rel: Numbers) -> A: ...
@overload
def coefficients(
    *, in_time: Numbers, in_sigma_rel: Lengths, out_time: Numbers, out_sigma_rel: Numbers
) -> np.ndarray: ...
def coefficients(*, in_time: Any, in_sigma_rel: Any, out_time: Any, out_sigma_rel: Any) -> Any:
    """The coefficients by which stored averages add up to others: average_out[j] = sum_i c[i, j] average_in[i].

    They are the least-squares fit of the output profile by the input profiles that end no later (later snapshots get
    0), scaled to sum to 1. Where inputs repeat, the solution of least norm. Computed in float64 on the host.

    Args:
        in_time, in_sigma_rel: when each stored average was taken and its length; shape [n_in], or broadcast to it. In a
            sequence, a length may be a :class:`Length`: a half-life in the unit of time, or ``Length.raw`` for weights.
        out_time, out_sigma_rel: time and sigma_rel of the averages wanted; shape [n_out], or broadcast to it.

    Returns:
        [n_in, n_out], in the library, dtype and device of ``in_sigma_rel``; NumPy float64 for lists and numbers.

    Source: Algorithm 3, Eq. 151. Departs from the paper: each column is divided by its sum, as for the published
    averages.

    Raises:
        InputError: no inputs, a time that is not positive, a length outside (0, 0.2887], a target before every input
            or after the last.

    >>> coefficients(in_time=[1, 2], in_sigma_rel=[0.10], out_time=2, out_sigma_rel=0.12).shape
    (2, 1)
    """
    stored, wanted = _stored(in_time, in_sigma_rel), _wanted(out_time, out_sigma_rel, in_time)
    return from_host(_fit(stored, wanted), like=in_sigma_rel)


@dataclass(frozen=True)
class ReconstructionError(Generic[A]):
    """How far reconstructed averages are from tracked ones: arrays [n_out], one element for each average wanted."""

    profile: A
    """Relative L2 norm of the difference of the profiles. The error of an average is at most that times the norm of the
    wanted profile times the L2 norm of the weights over time. Where weights are white noise, the standard deviation of
    the error is that times the standard deviation of the average."""
    amplification: A
    """2-norm of the coefficients, by which rounding errors grow that are independent between snapshots."""
    rounding: A
    """``amplification`` times the epsilon of the dtype of storage."""

    @property
    def total(self) -> A:
        """``profile`` and ``rounding`` together."""
        return cast(A, self.profile + self.rounding)


@overload
def reconstruction_error(
    *, in_time: Numbers, in_sigma_rel: A, out_time: Numbers, out_sigma_rel: Numbers, dtype: str = "float16"
) -> ReconstructionError[A]: ...
@overload
def reconstruction_error(
    *, in_time: Numbers, in_sigma_rel: Lengths, out_time: Numbers, out_sigma_rel: Numbers, dtype: str = "float16"
) -> ReconstructionError[np.ndarray]: ...
def reconstruction_error(
    *, in_time: Any, in_sigma_rel: Any, out_time: Any, out_sigma_rel: Any, dtype: str = "float16"
) -> ReconstructionError[Any]:
    """The error of reconstruction with the :func:`coefficients` of the same arguments, from snapshots in ``dtype``.

    Returns:
        Fields [n_out], in the library, dtype and device of ``in_sigma_rel``; NumPy float64 for lists and numbers.

    Source: ours, from the inner products of Eq. 151.

    Raises:
        InputError: as :func:`coefficients`, or an unknown ``dtype``.
    """
    if dtype not in STORAGE:
        raise InputError(f"dtype must be one of {', '.join(STORAGE)}, got {dtype!r}")
    stored, wanted = _stored(in_time, in_sigma_rel), _wanted(out_time, out_sigma_rel, in_time)
    fit = _fit(stored, wanted)
    profile, amplification = _distance(stored, wanted, fit), np.sqrt(np.sum(fit**2, axis=0))
    fields = (profile, amplification, amplification * STORAGE[dtype])
    return ReconstructionError(*(from_host(field, like=in_sigma_rel) for field in fields))


@overload
def reconstructed_profile(
    t: Numbers, /, *, in_time: Numbers, in_sigma_rel: A, out_time: Numbers, out_sigma_rel: Numbers
) -> A: ...
@overload
def reconstructed_profile(
    t: Numbers, /, *, in_time: Numbers, in_sigma_rel: Lengths, out_time: Numbers, out_sigma_rel: Numbers
) -> np.ndarray: ...
def reconstructed_profile(t: Any, /, *, in_time: Any, in_sigma_rel: Any, out_time: Any, out_sigma_rel: Any) -> Any:
    """The profile of a reconstructed average: stored profiles added up by the :func:`coefficients` of the same
    arguments. To compare with :func:`~edm2_core.ema.profile`.

    Args:
        t: times, [n_t].
        in_time, in_sigma_rel, out_time, out_sigma_rel: as for :func:`coefficients`.

    Returns:
        [n_out, n_t], in the library, dtype and device of ``in_sigma_rel``; NumPy float64 for lists and numbers.

    Source: Eq. 119, Algorithm 3.

    Raises:
        InputError: as :func:`coefficients`.
    """
    stored, wanted = _stored(in_time, in_sigma_rel), _wanted(out_time, out_sigma_rel, in_time)
    responses = stored.take((slice(None), None))(np.atleast_1d(to_host(t)))  # [n_in, n_t]
    return from_host(_fit(stored, wanted).T @ responses, like=in_sigma_rel)


def _stored(time: Any, sigma_rel: Any) -> Profile:
    if isinstance(sigma_rel, Sequence):
        times, index = _vectors(time, range(len(sigma_rel)), "in")
        lengths = [Length.of(length) for length in sigma_rel]
        return Profile.stack(lengths[int(i)].profile(t) for t, i in zip(times, index, strict=True))
    return Profile.power(*_vectors(time, sigma_rel, "in"))


def _wanted(time: Any, sigma_rel: Any, in_time: Any) -> Profile:
    times, lengths = _vectors(time, sigma_rel, "out")
    first, last = np.min(to_host(in_time)), np.max(to_host(in_time))
    near = 8 * _EPS  # times may carry rounding of a change of unit
    outside = times[(times < first * (1 - near)) | (times > last * (1 + near))]
    if outside.size:
        raise InputError(
            f"a target must lie between the first snapshot and the last, {first:g} to {last:g}, got {outside[0]:g}: "
            "choose a time in between"
        )
    return Profile.power(times, lengths)


def _vectors(time: Any, sigma_rel: Any, side: str) -> tuple[np.ndarray, np.ndarray]:
    times, lengths = np.broadcast_arrays(np.atleast_1d(to_host(time)), to_host(sigma_rel))
    if times.ndim != 1 or times.size == 0:
        raise InputError(
            f"{side}_time and {side}_sigma_rel must be one or more numbers in a row, got shape {times.shape}"
        )
    check_range(times, f"{side}_time", "positive", lambda x: x > 0)
    return times, lengths


def _fit(stored: Profile, wanted: Profile) -> np.ndarray:
    """[n_in, n_out]: the coefficients, each column divided by its sum."""
    order = np.argsort(stored.time, kind="stable")
    stored = stored.take(order)
    usable = np.searchsorted(stored.time, wanted.time * (1 + 8 * _EPS), side="right")
    gram, target = stored.outer(stored), stored.outer(wanted)
    scale = np.diagonal(gram)[:, None] ** -0.5  # unit diagonal: short and long averages count alike
    fit = scale * _solve(gram * scale * scale.T, target * scale, usable)
    result: np.ndarray = np.empty_like(fit)
    result[order] = fit / fit.sum(axis=0)
    return result


def _solve(gram: np.ndarray, target: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Column j: the least-norm x with gram x = target[:, j] among the first usable[j] unknowns, 0 in the others."""
    among = np.arange(len(gram))[:, None] < usable
    try:
        factor = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        factor = np.zeros_like(gram)
    if np.diagonal(factor).min() > _INDEPENDENT:
        inverse = np.linalg.inv(factor)  # lower triangular: its leading blocks are those blocks' inverses
        solution: np.ndarray = np.where(among, inverse.T @ np.where(among, inverse @ target, 0), 0)
        return solution
    result = np.zeros_like(target)
    for count in np.unique(usable):
        values, vectors = np.linalg.eigh(gram[:count, :count])
        vectors = vectors[:, values > count * _EPS * values[-1]]
        values = values[values > count * _EPS * values[-1]]
        columns = usable == count
        result[:count, columns] = vectors @ ((vectors.T @ target[:count, columns]) / values[:, None])
    return result


def _distance(stored: Profile, wanted: Profile, fit: np.ndarray) -> np.ndarray:
    """[n_out]: relative L2 norm of the difference between the fitted profile and the wanted one."""
    gram, target = stored.outer(stored), stored.outer(wanted)
    norm = wanted @ wanted
    square = np.sum(fit * (gram @ fit), axis=0) - 2 * np.sum(fit * target, axis=0) + norm
    distance: np.ndarray = np.sqrt(np.maximum(square, 0) / norm)
    return distance
