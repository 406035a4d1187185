"""Convolutions that keep the size of the image, computed in the way that is fastest on the device.

On a GPU this is ``mx.conv2d``. On MLX's CPU build ``mx.conv2d`` takes 2 to 4 times as long as a sum of matrix products,
one for each tap of the kernel, of the shifted image and the tap's weights. Matrix products run on one core there, and
are slow if the second factor is transposed. Here neither the forward nor the backward pass transposes it, and work is
split over one stream per core.

``mx.conv2d`` has no forward derivative, but the sum has: take ``mx.jvp`` of a network within ``mx.stream(mx.cpu)``.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")
Pair = tuple[mx.array, mx.array]
_WORTH_A_CORE = 4_000_000  # products, 2 ms of work: handing it to another core costs up to 0.1 ms
_LOCAL = threading.local()  # a stream belongs to the thread that made it


def convolve(x: mx.array, w: mx.array) -> mx.array:
    """[N, H, W, in] and [out, k, k, in], k odd, to [N, H, W, out]; zeros beyond the border."""
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x, w, padding=w.shape[1] // 2)
    y: Any = by_taps(x, w)  # its declared type is object
    return y


@mx.custom_function
def by_taps(x: mx.array, w: mx.array) -> mx.array:
    return _by_taps(x, mx.contiguous(w.transpose(1, 2, 3, 0)))


@by_taps.vjp
def _back(primals: Pair, cotangent: mx.array, _: mx.array) -> Pair:
    x, w = primals
    turned = mx.contiguous(w.transpose(1, 2, 0, 3)[::-1, ::-1])
    flat = cotangent.reshape(-1, w.shape[0]).T  # (out, N H W)
    streams = _streams(x.size * w.size // x.shape[-1])
    taps = _spread(
        lambda part: flat @ part.reshape(-1, x.shape[-1]), _shifted(x, w.shape[1]), streams
    )  # each (out, in)
    return _by_taps(cotangent, turned), mx.stack(taps, axis=1).reshape(w.shape)


def _by_taps(x: mx.array, taps: mx.array) -> mx.array:
    """:func:`convolve` with the weight as ``taps`` [k, k, in, out]."""
    size, _, inner, outer = taps.shape
    flat, streams = taps.reshape(-1, inner, outer), _streams(x.size * taps.size // inner)[: len(x)]
    cuts = [len(x) * i // len(streams) for i in range(1, len(streams))]

    def part(images: mx.array) -> mx.array:
        pixels = (shifted.reshape(-1, inner) for shifted in _shifted(images, size))  # each (N H W, in)
        first, *others = (rows @ tap for rows, tap in zip(pixels, flat, strict=True))
        return sum(others, first)

    return mx.concatenate(_spread(part, list(mx.split(x, cuts)), streams)).reshape(*x.shape[:3], outer)


def _shifted(x: mx.array, size: int) -> list[mx.array]:
    """For each tap of a ``size`` x ``size`` kernel, the image [N, H, W, C] that it is multiplied with."""
    _, h, w, _ = x.shape
    pad = size // 2
    padded = mx.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)]) if pad else x
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


def _spread(function: Callable[[T], mx.array], items: Sequence[T], streams: Sequence[mx.Stream]) -> list[mx.array]:
    """``function`` of each item, on the ``streams`` in turn."""
    results = []
    for i, item in enumerate(items):
        with mx.stream(streams[i % len(streams)]):
            results.append(function(item))
    return results


def _streams(products: int) -> list[mx.Stream]:
    """The streams for so many products: the default one and, if there is enough work, one for each other core.

    On a Mac only the default one, since its matrix products use all cores by themselves.
    """
    cores = 1 if sys.platform == "darwin" else min(os.cpu_count() or 1, 8, max(products // _WORTH_A_CORE, 1))
    others = _LOCAL.__dict__.setdefault("streams", [])
    others += [mx.new_stream(mx.cpu) for _ in range(cores - 1 - len(others))]
    return [mx.default_stream(mx.cpu), *others[: cores - 1]]
