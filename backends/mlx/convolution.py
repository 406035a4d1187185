"""How is a convolution that keeps the size computed fastest on this device?

On the GPU by ``mx.conv2d``. The CPU build's takes 2 to 4 times as long as a sum over the kernel's taps of one matrix
product each, of the shifted image and the tap's weights. Its matrix products run on one core, and are slow where the
second factor is transposed: here none is, on the way there or back, and every core has a stream and a share of them.

``mx.conv2d`` has no forward derivative; the sum has: take ``mx.jvp`` of a network within
``mx.stream(mx.cpu)``.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")
Pair = tuple[mx.array, mx.array]
_WORTH_A_CORE = 4_000_000  # products, two milliseconds: to hand over takes up to a tenth of one
_LOCAL = threading.local()  # a stream belongs to the thread that made it


def convolve(x: mx.array, w: mx.array) -> mx.array:
    """[N, H, W, in] and [out, k, k, in], k odd, to [N, H, W, out]; zeros beyond the border."""
    if mx.default_device() == mx.gpu:
        return mx.conv2d(x, w, padding=w.shape[1] // 2)
    found: Any = by_taps(x, w)
    return found  # custom_function says object


@mx.custom_function
def by_taps(x: mx.array, w: mx.array) -> mx.array:
    return _by_taps(x, mx.contiguous(w.transpose(1, 2, 3, 0)))


@by_taps.vjp
def _back(primals: Pair, cotangent: mx.array, _: mx.array) -> Pair:
    x, w = primals
    turned = mx.contiguous(w.transpose(1, 2, 0, 3)[::-1, ::-1])
    flat, seen = cotangent.reshape(-1, w.shape[0]).T, _shifted(x, w.shape[1])
    taps = _spread(lambda part: flat @ part.reshape(-1, x.shape[-1]), seen, _streams(x.size * w.size // x.shape[-1]))
    return _by_taps(cotangent, turned), mx.stack(taps, axis=1).reshape(w.shape)


def _by_taps(x: mx.array, taps: mx.array) -> mx.array:
    """``taps`` [k, k, in, out]."""
    size, _, inner, outer = taps.shape
    flat, streams = taps.reshape(-1, inner, outer), _streams(x.size * taps.size // inner)[: len(x)]
    cuts = [len(x) * i // len(streams) for i in range(1, len(streams))]

    def part(images: mx.array) -> mx.array:
        first, *others = (seen.reshape(-1, inner) @ tap for seen, tap in zip(_shifted(images, size), flat, strict=True))
        return sum(others, first)

    return mx.concatenate(_spread(part, list(mx.split(x, cuts)), streams)).reshape(*x.shape[:3], outer)


def _shifted(x: mx.array, size: int) -> list[mx.array]:
    """What each tap of a ``size`` x ``size`` kernel sees of the image."""
    _, h, w, _ = x.shape
    around = size // 2
    padded = mx.pad(x, [(0, 0), (around, around), (around, around), (0, 0)]) if around else x
    return [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]


def _spread(function: Callable[[T], mx.array], items: Sequence[T], streams: Sequence[mx.Stream]) -> list[mx.array]:
    """``function`` of each item, on the ``streams`` in turns."""
    found = []
    for i, item in enumerate(items):
        with mx.stream(streams[i % len(streams)]):
            found.append(function(item))
    return found


def _streams(products: int) -> list[mx.Stream]:
    """Where to compute so many products: here and, as far as they last for a while, on other cores.

    Never on others on a Mac: its matrix products use all cores themselves.
    """
    cores = 1 if sys.platform == "darwin" else min(os.cpu_count() or 1, 8, max(products // _WORTH_A_CORE, 1))
    others = _LOCAL.__dict__.setdefault("streams", [])
    others += [mx.new_stream(mx.cpu) for _ in range(cores - 1 - len(others))]
    return [mx.default_stream(mx.cpu), *others[: cores - 1]]
