"""Attention over tokens, by products of matrices or by cuDNN's fused kernel. Shapes: [N, tokens, heads, D]."""

from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Attend = Callable[[Array, Array, Array], Array]
"""softmax(q k^T / sqrt(D)) v of q, k and v, in their dtype."""


def by_products(q: Array, k: Array, v: Array, /) -> Array:
    """With the softmax in float32."""
    scores = jnp.einsum("nqhc,nkhc->nhqk", q, k, preferred_element_type=jnp.float32) / sqrt(q.shape[-1])
    attended = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [N, heads, tokens, tokens]
    return jnp.einsum("nhqk,nkhc->nqhc", attended, v)


def fused(q: Array, k: Array, v: Array, /) -> Array:
    """By cuDNN, which keeps no weights of attention for the backward pass, in programs for an NVIDIA GPU. It has no
    forward-mode derivative.

    By products where cuDNN does not take such arrays, as in float32, or gave other numbers when it was tried.
    """
    return _by_cudnn(q, k, v) if cudnn_agrees(q.shape[1:], q.dtype.name) else by_products(q, k, v)


def fastest(device: Any, /) -> Attend:
    """The means on a device, for programs that are not differentiated forwards."""
    return fused if device.platform == "gpu" else by_products


@cache
def cudnn_agrees(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether cuDNN attends to tokens of this shape and dtype, forward and backward, to the rounding of that dtype.

    It is tried, on two images: what it takes depends on its version and on the GPU.
    """
    if dtype not in ("bfloat16", "float16"):
        return False
    draw = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():  # a program that attends may be in the middle of its trace
        given = [jnp.asarray(draw.normal(size=(2, *shape)), dtype) for _ in range(4)]
        try:
            made = _both_ways(_by_cudnn, *given)
        except Exception:  # of many kinds: no cuDNN, an old one, a shape or a GPU that it was not written for
            return False
        wanted = _both_ways(by_products, *(x.astype(jnp.float32) for x in given))
        return all(_is_near(*pair) for pair in zip(made, wanted, strict=True))


def _by_cudnn(q: Array, k: Array, v: Array, /) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _both_ways(attend: Attend, q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, ...]:
    """The result, and the gradients by q, k and v."""
    result, back = jax.vjp(attend, q, k, v)
    return (result, *back(gradient))


def _is_near(made: Array, wanted: Array) -> bool:
    """To a few roundings: of weights, of their gradients, and of the result."""
    limit = 8 * float(jnp.finfo(made.dtype).eps) * jnp.abs(wanted).max()
    return bool(jnp.abs(made.astype(jnp.float32) - wanted).max() <= limit)
