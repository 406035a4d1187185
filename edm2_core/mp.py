"""Magnitude-preserving primitives: every function maps inputs of unit variance to outputs of unit variance.

For x with uncorrelated elements of variance 1:

    mp_sum      a linear blend of independent inputs has variance (1-t)^2 + t^2, so divide by its root          (Eq. 88)
    mp_cat      blended inputs keep their share of the output's energy at any channel counts                   (Eq. 103)
    mp_silu     E[silu(x)^2] = 0.3555 = 0.596^2 for x ~ N(0, 1)                                                 (Eq. 81)
    mp_fourier  E[cos^2] = 1/2 over uniform phases, so multiply by sqrt(2)                                      (Eq. 75)
    mp_weight   a row of unit norm preserves variance: sum_j w_ij^2 = 1                                         (Eq. 47)

Arrays of any array API library go in; the same library, dtype and device come out. Norms and angles are computed in
float32 or better. Source: arXiv 2312.02696 Appendices B.4 to B.7.
"""

from math import prod, sqrt
from typing import Literal

from .arrays import Array, cast, namespace, scalars_too, widened
from .errors import InputError

Resample = Literal["keep", "up", "down"]
SILU_RMS = 0.596


def normalize(x: Array, /, *, axis: int | tuple[int, ...] | None = None, eps: float = 1e-4) -> Array:
    """Scale ``x`` to unit root mean square over ``axis`` (None: all axes but the first; 1: pixel norm of NCHW).

    out = x / (eps + rms(x)), rms over ``axis``. Source: Eqs. 30, 47, Algorithm 1. Shapes: any, kept. Departs from the
    paper: nothing (eps is added to the root mean square, as in Algorithm 1 and not as in Eq. 30).

    Raises:
        InputError: ``axis`` is None and ``x`` has fewer than two axes.
    """
    if axis is None:
        if x.ndim < 2:
            raise InputError(f"normalize over all axes but the first needs two or more, got shape {x.shape}: give axis")
        axis = tuple(range(1, x.ndim))
    axes = (axis,) if isinstance(axis, int) else axis
    xp, wide = namespace(x), widened(x)
    norm = xp.sqrt(xp.sum(wide * wide, axis=axes, keepdims=True))
    return cast(wide / (norm * (1 / sqrt(prod(x.shape[i] for i in axes))) + eps), x)


@scalars_too
def silu(x: Array, /) -> Array:
    """x sigmoid(x), elementwise. Source: Eq. 9. No overflow where the answer is finite. Shapes: any, kept."""
    return _silu(x, rms=1.0)


@scalars_too
def mp_silu(x: Array, /) -> Array:
    """silu(x) / 0.596, elementwise. Source: Eq. 81. No overflow where the answer is finite. Shapes: any, kept."""
    return _silu(x, rms=SILU_RMS)


def _silu(x: Array, *, rms: float) -> Array:
    xp, wide = namespace(x), widened(x)
    tail = xp.exp(-xp.abs(wide))  # at most 1: nothing overflows on either side
    return cast(wide * xp.where(wide >= 0, xp.ones_like(tail), tail) / ((1 + tail) * rms), x)


def blend(t: float, /) -> tuple[float, float]:
    """Factors of a and b in the sum of the two that preserves magnitude; t within [0, 1]. Source: Eq. 88."""
    scale = 1 / sqrt((1 - t) ** 2 + t**2)
    return (1 - t) * scale, t * scale


@scalars_too
def mp_sum(a: Array, b: Array, /, *, t: float = 0.5) -> Array:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2). Source: Eq. 88. ``a`` and ``b`` broadcast."""
    keep, add = blend(t)
    return a * keep + b * add


def mp_cat(a: Array, b: Array, /, *, axis: int, t: float = 0.5) -> Array:
    """Concatenate so that ``a`` and ``b`` contribute (1-t) : t in magnitude whatever their sizes along ``axis``.

    Source: Eq. 103. Shapes: equal but along ``axis``, where the sizes add.
    """
    size_a, size_b = a.shape[axis], b.shape[axis]
    (keep, add), size = blend(t), size_a + size_b
    return namespace(a, b).concat([a * (keep * sqrt(size / size_a)), b * (add * sqrt(size / size_b))], axis=axis)


def mp_fourier(x: Array, freqs: Array, phases: Array, /) -> Array:
    """sqrt(2) cos(freqs x + phases): shape [...] and two of [C] to [..., C]. Source: Eqs. 35, 75.

    Departs from the paper: ``freqs`` and ``phases`` already hold the factor 2 pi.
    """
    angles = widened(x)[..., None] * widened(freqs) + widened(phases)
    return cast(namespace(x).cos(angles) * sqrt(2), x)


def mp_weight(w: Array, /, *, gain: float | Array = 1.0) -> Array:
    """The weight that a layer computes with: every output's row of ``w`` at norm ``gain``.

    Source: Eq. 47, Algorithm 1. Shapes: [out, ...], kept; ``gain`` a number or 0-d. The gradient through it is
    orthogonal to ``w``, row by row (Eq. 59).
    """
    return normalize(w) * (gain * (1 / sqrt(prod(w.shape[1:]))))


def force_weight_norm(w: Array, /) -> Array:
    """The weight as it is stored: every output's row of ``w`` at norm sqrt(fan-in). Source: Eq. 66, Algorithm 1.

    Departs from the paper: eps leaves a root mean square of r / (r + 1e-4); it settles at 1 - 1e-4, where forcing again
    moves a weight by no more than 1e-8.
    """
    return normalize(w)


def resample(x: Array, /, *, mode: Resample, filter: tuple[float, ...] = (1, 1)) -> Array:
    """Keep, halve or double the resolution of NCHW ``x`` with a separable filter, zeros beyond the border.

    ``filter``, of even length, is scaled to sum 1; up is the transpose of down times 4, so away from the border
    a symmetric filter keeps constants. (1, 1) is the 2x2 box: the mean of four pixels down, each pixel four times up.
    Source: Figure 22 ("Down 2x2").

    Raises:
        InputError: unknown mode, odd or zero-sum filter, or odd size to halve.
    """
    if mode == "keep":
        return x
    if mode not in ("up", "down"):
        raise InputError(f"resample mode must be 'keep', 'up' or 'down', got {mode!r}")
    if len(filter) < 2 or len(filter) % 2 or sum(filter) == 0:
        raise InputError(
            f"resample filter must have an even number of taps and a nonzero sum, got {filter}: try (1, 1)"
        )
    taps = [tap / sum(filter) for tap in filter]
    if mode == "down" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise InputError(f"resampling down needs even height and width, got {x.shape[2]}x{x.shape[3]}: pad the images")
    along = _down if mode == "down" else _up
    return along(along(x, taps, 2), taps, 3)


def _padded(x: Array, axis: int, pad: int) -> Array:
    """``x`` with ``pad`` zeros on either side along ``axis``."""
    if pad == 0:
        return x
    xp = namespace(x)
    zeros = xp.concat([xp.zeros_like(x[(*(slice(None),) * axis, slice(0, 1), ...)])] * pad, axis=axis)
    return xp.concat([zeros, x, zeros], axis=axis)


def _down(x: Array, taps: list[float], axis: int) -> Array:
    size, pad = x.shape[axis], (len(taps) - 1) // 2
    padded, before = _padded(x, axis, pad), (slice(None),) * axis
    return sum(tap * padded[(*before, slice(k, k + size - 1, 2), ...)] for k, tap in enumerate(taps))


def _up(x: Array, taps: list[float], axis: int) -> Array:
    xp, size, pad = namespace(x), x.shape[axis], (len(taps) - 1) // 2
    reach = len(taps) // 2
    padded, before = _padded(x, axis, reach), (slice(None),) * axis
    phases = []
    for r in (0, 1):  # output pixel 2 m + r gathers the taps k for which 2 m + r + pad - k is even
        shifts = [(tap, (r + pad - k) // 2 + reach) for k, tap in enumerate(taps) if (r + pad - k) % 2 == 0]
        phases.append(sum(2 * tap * padded[(*before, slice(at, at + size), ...)] for tap, at in shifts))
    shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return xp.reshape(xp.stack(phases, axis=axis + 1), shape)
