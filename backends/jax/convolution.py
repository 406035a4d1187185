"""Convolution in the layout that accelerators compute in, NHWC and HWIO, by the fastest means on the device."""

import jax
import jax.numpy as jnp
from jax import Array, lax

_CACHED = 1 << 17  # numbers of a part of x


@jax.custom_jvp
def convolution(x: Array, w: Array) -> Array:
    """[N, H, W, C] with a kernel [kh, kw, C, D] of odd sizes, keeping the size.

    On CPUs the derivative along the kernel is computed as matrix products, and so is the kernel's gradient: as a
    convolution with windows as large as images it takes longer there.
    """
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@convolution.defjvp
def _convolution_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, w), (dx, dw) = primals, tangents
    along_w = lax.platform_dependent(x, dw, cpu=by_products, default=convolution)
    return convolution(x, w), convolution(dx, w) + along_w


def by_products(x: Array, w: Array) -> Array:
    """:func:`convolution` as a matrix product for each tap of the kernel, on as many images at a time as caches hold.
    Its transpose, the kernel's gradient, is a product for each tap too, summed over those parts."""
    (n, height, width, channels), (kh, kw) = x.shape, w.shape[:2]
    taps, size = w.reshape(-1, *w.shape[2:]), height * width * channels
    some = max(c for c in range(1, n + 1) if n % c == 0 and (c == 1 or c * size <= _CACHED))

    @jax.checkpoint  # saves x for the backward pass, not all its shifted copies
    def convolved(images: Array) -> Array:
        padded = jnp.pad(images, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
        shifted = (padded[:, i : i + height, j : j + width] for i in range(kh) for j in range(kw))
        rows = (pixels.reshape(-1, channels) for pixels in shifted)
        total: Array = sum(pixels @ tap for pixels, tap in zip(rows, taps, strict=True))
        return total.reshape(*images.shape[:3], -1)

    if some == n:
        return convolved(x)
    return lax.map(convolved, x.reshape(-1, some, height, width, channels)).reshape(n, height, width, -1)
