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
    """By cuDNN's flash attention, which stores no attention weights for the backward pass; for NVIDIA GPUs, without a
    forward-mode derivative.

    Falls back to :func:`by_products` where cuDNN does not support such arrays, as in float32, or gave other numbers
    when it was tried (:func:`cudnn_agrees`).
    """
    return _by_cudnn(q, k, v) if cudnn_agrees(q.shape[1:], q.dtype.name) else by_products(q, k, v)


def fastest(device: Any, /) -> Attend:
    """The fastest function of this module on ``device``, for programs without forward-mode derivatives."""
    return fused if device.platform == "gpu" else by_products


@cache
def cudnn_agrees(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether cuDNN's attention agrees with :func:`by_products`, forward and backward, to the rounding of ``dtype``.

    It is run once for each ``shape``, [tokens, heads, D], on two images: what cuDNN supports depends on its version and
    on the GPU.
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
