"""How do many numbers become float16, or come from it, in the time that it takes to read them?

NumPy converts float16 one by one. Here the bits are moved to their places, all at once, several times as fast.
"""

import sys

import numpy as np

_BIAS = np.float32(2.0**112)  # by which the exponents of float32 and float16 differ
_PIECE = 1 << 14  # elements that stay in the cache through all passes


def widen(stored: np.ndarray, dtype: str, values: np.ndarray, /) -> None:
    """Copy ``stored``, what a file calls ``dtype``, into the float32 ``values`` of the same shape.

    The sign spreads over what is shifted, and all but one copy of it is masked; the exponent's bias is multiplied in.
    That makes infinity and nan large numbers, so what is so large is converted again.
    """
    if dtype == "BF16":
        np.left_shift(stored, 16, out=values.view(np.uint32), dtype=np.uint32)
        return
    if dtype == "F16" and sys.byteorder == "little":
        bits = values.view(np.int32)
        np.left_shift(stored.view(np.int16), 13, out=bits, dtype=np.int32)
        np.bitwise_and(bits, np.int32(-0x70000001), out=bits)
        np.multiply(values, _BIAS, out=values)
        if values.min(initial=0) > -65536 and values.max(initial=0) < 65536:
            return
    values[:] = stored


def narrow(values: np.ndarray, halves: np.ndarray, /) -> None:
    """Round float32 ``values``, none larger than float16 holds, to ``halves``; both contiguous, of one shape.

    To nearest, ties to even, as NumPy does; but below 2^-14, where float16 has fewer digits, a value so near a tie that
    float32 cannot tell it from one there is taken for one.
    """
    if sys.byteorder != "little":
        halves[...] = values
        return
    flat, out = values.reshape(-1), halves.reshape(-1).view(np.uint16)
    scaled = np.empty(min(flat.size, _PIECE), np.float32)
    kept = np.empty(scaled.size, np.uint32)
    for start in range(0, flat.size, _PIECE):
        part = flat[start : start + _PIECE]
        own = np.multiply(part, 1 / _BIAS, out=scaled[: part.size]).view(np.uint32)
        other = kept[: part.size]
        np.right_shift(own, 13, out=other)
        np.bitwise_and(other, 1, out=other)
        other += 0xFFF  # just under half of what is cut off, and a half where the last digit kept is odd
        np.bitwise_and(own, 0x7FFFFFFF, out=own)
        own += other
        own >>= 13
        np.right_shift(part.view(np.uint32), 16, out=other)
        np.bitwise_and(other, 0x8000, out=other)
        np.bitwise_or(own, other, out=own)
        out[start : start + part.size] = own
