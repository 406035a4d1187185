"""How is a convolution that keeps the size computed fastest on this device?

On the GPU by ``mx.conv2d``. The CPU build's takes 2 to 4 times as long as a sum over the kernel's taps of one matrix
product each, of the shifted image and the tap's weights. Its matrix products run on one core, and are slow where the
second factor is transposed: here none is, on the way there or back, and every core has a stream and a share of them.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")
Pair = tuple[mx.array, mx.array]


def convolve(x: mx.array, w: mx.array) -> mx.array:
    """[N, H, W, in] and [out, k, k, in], k odd, to [N, H, W, out]; zeros beyond the border."""
    return (by_library if mx.default_device() == mx.gpu else by_taps)(x, w)


@mx.custom_function
def by_library(x: mx.array, w: mx.array) -> mx.array:
    return mx.conv2d(x, w, padding=w.shape[1] // 2)


@by_library.jvp
def _along(primals: Pair, tangents: Pair) -> mx.array:
    """MLX has no forward derivative of a convolution; it is linear in each of its arguments."""
    (x, w), (dx, dw) = primals, tangents
    return by_library(dx, w) + by_library(x, dw)


@mx.custom_function
def by_taps(x: mx.array, w: mx.array) -> mx.array:
    return _by_taps(x, mx.contiguous(w.transpose(1, 2, 3, 0)))


@by_taps.vjp
def _back(primals: Pair, cotangent: mx.array, _: mx.array) -> Pair:
    x, w = primals
    turned = mx.contiguous(w.transpose(1, 2, 0, 3)[::-1, ::-1])
    flat = cotangent.reshape(-1, w.shape[0]).T
    taps = _spread(lambda part: flat @ part.reshape(-1, x.shape[-1]), _shifted(x, w.shape[1]))
    return _by_taps(cotangent, turned), mx.stack(taps, axis=1).reshape(w.shape)


def _by_taps(x: mx.array, taps: mx.array) -> mx.array:
    """``taps`` [k, k, in, out]."""
    size, _, inner, outer = taps.shape
    flat = taps.reshape(-1, inner, outer)

    def part(images: mx.array) -> mx.array:
        return sum(seen.reshape(-1, inner) @ tap for seen, tap in zip(_shifted(images, size), flat, strict=True))

    return mx.concatenate(_spread(part, mx.split(x, _cuts(len(x))))).reshape(*x.shape[:3], outer)


def _shifted(x: mx.array, size: int) -> list[mx.array]:
    """What each tap of a ``size`` x ``size`` kernel sees of the image."""
    _, h, w, _ = x.shape
    around = size // 2
    padded = mx.pad(x, ((0, 0), (around, around), (around, around), (0, 0))) if around else x
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


def _spread(function: Callable[[T], mx.array], items: Sequence[T]) -> list[mx.array]:
    """``function`` of each item, computed on all cores, in turns."""
    found = []
    for i, item in enumerate(items):
        with mx.stream(_streams()[i % len(_streams())]):
            found.append(function(item))
    return found


@lru_cache
def _streams() -> list[mx.Stream]:
    """One for each core, as far as convolutions are large enough to share; one on a Mac, whose products use all."""
    cores = 1 if sys.platform == "darwin" else min(os.cpu_count() or 1, 8)
    return [mx.new_stream(mx.cpu) for _ in range(cores)]


def _cuts(count: int) -> list[int]:
    """Where to cut ``count`` images into a share for each core."""
    cores = min(len(_streams()), count)
    return [count * core // cores for core in range(1, cores)]
