"""Magnitude-preserving primitives: every function maps inputs of unit variance to outputs of unit variance.

For x with uncorrelated elements of variance 1:

    mp_sum      a linear blend of independent inputs has variance (1-t)^2 + t^2, so divide by its root          (Eq. 88)
    mp_cat      blended inputs keep their share of the output's energy at any channel counts                   (Eq. 103)
    mp_silu     E[silu(x)^2] = 0.3555 = 0.596^2 for x ~ N(0, 1)                                                 (Eq. 81)
    mp_fourier  E[cos^2] = 1/2 over uniform phases, so multiply by sqrt(2)                                      (Eq. 75)
    mp_weight   a row of unit norm preserves variance: sum_j w_ij^2 = 1                                         (Eq. 47)

Functions take arrays of any array API library and return arrays of the same library, dtype and device. Norms and angles
are computed in float32 or better. Where nothing else is said, a function departs from the paper in nothing. Source:
arXiv 2312.02696 Appendices B.4 to B.7.
"""

import operator
from functools import reduce
from math import prod, sqrt
from typing import Any, Literal, cast

from .arrays import A, Array, in_dtype_of, namespace, scalars_too, widened
from .errors import InputError

Resample = Literal["keep", "up", "down"]
SILU_RMS = 0.596


def normalize(x: A, /, *, axis: int | tuple[int, ...] | None = None, eps: float = 1e-4) -> A:
    """Scale ``x`` to unit root mean square over ``axis``: x / (eps + rms(x)).

    Args:
        x: of any shape.
        axis: the axes that share one root mean square. None is all but the first, as for the rows of a weight; 1 is
            pixel norm of NCHW images.
        eps: added to the root mean square.

    Returns:
        Like ``x``.

    Where all elements are 0, so is the result; its derivative is that of x / eps, as for all small x.

    Source: Eqs. 30, 47, Algorithm 1. Departs from the paper: eps is added as in Algorithm 1, not inside the root as in
    Eq. 30.

    Raises:
        InputError: ``axis`` is None and ``x`` has fewer than two axes.

    >>> import numpy as np
    >>> normalize(np.array([[3.0, 4.0]]), eps=0) * np.sqrt(2)
    array([[1.2, 1.6]])
    """
    if axis is None:
        if x.ndim < 2:
            raise InputError(f"normalize over all axes but the first needs two or more, got shape {x.shape}: give axis")
        axis = tuple(range(1, x.ndim))
    axes = (axis,) if isinstance(axis, int) else axis
    xp, wide = namespace(x), widened(x)
    square = xp.sum(wide * wide, axis=axes, keepdims=True)
    some = cast(Any, square) > 0  # elsewhere sqrt has no derivative
    norm = xp.sqrt(xp.where(some, square, xp.ones_like(square))) * xp.astype(some, square.dtype)
    return in_dtype_of(x, wide / (norm * (1 / sqrt(prod(x.shape[i] for i in axes))) + eps))


@scalars_too
def silu(x: Array, /) -> Array:
    """x sigmoid(x), elementwise; finite wherever the result is. Shapes: any, kept. Floats give floats. Source: Eq. 9.

    >>> silu(0.0)
    0.0
    """
    return _silu(x, rms=1.0)


@scalars_too
def mp_silu(x: Array, /) -> Array:
    """silu(x) / 0.596, elementwise; finite wherever the result is. Shapes: any, kept. Floats give floats.

    Source: Eq. 81.
    """
    return _silu(x, rms=SILU_RMS)


def _silu(x: Array, *, rms: float) -> Array:
    xp, wide = namespace(x), widened(x)
    tail = xp.exp(-xp.abs(wide))  # at most 1: nothing overflows on either side
    return in_dtype_of(x, wide * xp.where(wide >= 0, xp.ones_like(tail), tail) / ((1 + tail) * rms))


def blend(t: float, /) -> tuple[float, float]:
    """Factors of a and b in the sum of the two that preserves magnitude; t within [0, 1]. Source: Eq. 88."""
    scale = 1 / sqrt((1 - t) ** 2 + t**2)
    return (1 - t) * scale, t * scale


@scalars_too
def mp_sum(a: Array, b: Array | float, /, *, t: float = 0.5) -> Array:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2): the share of ``b`` in the sum is ``t``.

    Shapes: ``a`` and ``b`` broadcast. Floats give floats. Source: Eq. 88.

    >>> mp_sum(3.0, 4.0, t=1.0)
    4.0
    """
    keep, add = blend(t)
    return a * keep + b * add


def mp_cat(a: A, b: A, /, *, axis: int, t: float = 0.5) -> A:
    """Concatenate so that ``a`` and ``b`` contribute (1-t) : t in magnitude whatever their sizes along ``axis``.

    Shapes: equal but along ``axis``, where the sizes add. Source: Eq. 103.
    """
    size_a, size_b = a.shape[axis], b.shape[axis]
    (keep, add), size = blend(t), size_a + size_b
    parts = [a * (keep * sqrt(size / size_a)), b * (add * sqrt(size / size_b))]
    return cast(A, namespace(a, b).concat(parts, axis=axis))


def mp_fourier(x: A, freqs: Array, phases: Array, /) -> A:
    """Random Fourier features sqrt(2) cos(freqs x + phases).

    Args:
        x: [...], for example c_noise [N].
        freqs, phases: [C], constants of the network.

    Returns:
        [..., C], in the dtype of ``x``.

    Source: Eqs. 35, 75. Departs from the paper: ``freqs`` and ``phases`` already hold the factor 2 pi.
    """
    angles = widened(x)[..., None] * widened(freqs) + widened(phases)  # [..., 1] -> [..., C]
    return in_dtype_of(x, namespace(x).cos(angles) * sqrt(2))


def mp_weight(w: A, /, *, gain: float | Array = 1.0) -> A:
    """The weight that a layer computes with: every output's row of ``w`` at norm ``gain``.

    Args:
        w: the stored weight, [out, ...]; a row is everything but the first axis.
        gain: a number, or a 0-d array.

    Returns:
        Like ``w``. The gradient through it is orthogonal to ``w``, row by row (Eq. 59).

    Source: Eq. 47, Algorithm 1. Raises InputError where ``w`` has fewer than two axes.
    """
    return cast(A, normalize(w) * (gain * (1 / sqrt(prod(w.shape[1:])))))


def force_weight_norm(w: A, /) -> A:
    """The weight as it is stored: every output's row of ``w`` at norm sqrt(fan-in), before each training step.

    Shapes: [out, ...], kept. Source: Eq. 66, Algorithm 1. Departs from the paper: eps leaves a root mean square of
    r / (r + 1e-4); it settles at 1 - 1e-4, where forcing again moves a weight by no more than 1e-8. Raises InputError
    where ``w`` has fewer than two axes.
    """
    return normalize(w)


def resample(x: A, /, *, mode: Resample, filter: tuple[float, ...] = (1, 1)) -> A:
    """Keep, halve or double the resolution with a separable filter, zeros beyond the border.

    Args:
        x: images, [N, C, H, W].
        mode: ``"keep"``, ``"up"`` or ``"down"``.
        filter: an even number of taps, which are scaled to sum 1. (1, 1) is the 2x2 box: the mean of four pixels down,
            each pixel four times up.

    Returns:
        [N, C, H, W], [N, C, 2 H, 2 W] or [N, C, H / 2, W / 2]. Up is the transpose of down times 4, so away from the
        border a symmetric filter keeps constants.

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
    return cast(A, along(along(x, taps, 2), taps, 3))


def _padded(x: Array, axis: int, pad: int) -> Array:
    """``x`` with ``pad`` zeros on either side along ``axis``: [..., S, ...] -> [..., S + 2 pad, ...]."""
    if pad == 0:
        return x
    xp = namespace(x)
    zeros = xp.concat([xp.zeros_like(x[(*(slice(None),) * axis, slice(0, 1), ...)])] * pad, axis=axis)
    return xp.concat([zeros, x, zeros], axis=axis)


def _down(x: Array, taps: list[float], axis: int) -> Array:
    """Half as many pixels along ``axis``: y[i] = sum_k taps[k] x[2 i + k - pad]."""
    size, pad = x.shape[axis], (len(taps) - 1) // 2
    padded, before = _padded(x, axis, pad), (slice(None),) * axis
    return reduce(operator.add, (tap * padded[(*before, slice(k, k + size - 1, 2), ...)] for k, tap in enumerate(taps)))


def _up(x: Array, taps: list[float], axis: int) -> Array:
    """Twice as many pixels along ``axis``: twice the transpose of :func:`_down`, even and odd pixels interleaved."""
    xp, size, pad = namespace(x), x.shape[axis], (len(taps) - 1) // 2
    reach = len(taps) // 2
    padded, before = _padded(x, axis, reach), (slice(None),) * axis
    phases = []
    for r in (0, 1):  # output pixel 2 m + r gathers the taps k for which 2 m + r + pad - k is even
        shifts = [(tap, (r + pad - k) // 2 + reach) for k, tap in enumerate(taps) if (r + pad - k) % 2 == 0]
        phases.append(
            reduce(operator.add, (2 * tap * padded[(*before, slice(at, at + size), ...)] for tap, at in shifts))
        )
    shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
    return xp.reshape(xp.stack(phases, axis=axis + 1), shape)
