"""Checksums in the metadata of a safetensors file, by which a changed byte is found when it is read.

``xxh3`` has, in JSON, eight hexadecimal digits for each :data:`PIECE` of each array: the low half of the 64-bit XXH3 of
its bytes in the file. ``xxh3_header`` has those of the header, whose own digits count as zeros. Files without them, of
other tools, are read unchecked.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from edm2_core.json_text import parse_json

PIECE = 1 << 14  # elements: a read that begins and ends at multiples of it is checked as a whole
KEY, OF_HEADER = "xxh3", "xxh3_header"
_DIGITS = 8
BLANK = "0" * _DIGITS
_SEAL = re.compile(rb'("xxh3(?:_header)?": ")([0-9a-f]{8})"')


def digest(data: Any, /) -> str:
    """The digits of these bytes."""
    return f"{xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF:08x}"


def of_array(array: np.ndarray, /) -> str:
    """The digits of the pieces of a contiguous array, as it is stored."""
    whole, step = array.reshape(-1).view(np.uint8).data, PIECE * array.itemsize
    return "".join(digest(whole[i : i + step]) for i in range(0, len(whole), step))


def blank(size: int, /) -> str:
    """Zeros in place of the digits of an array of ``size`` elements."""
    return BLANK * -(-size // PIECE)


def sealed(header: bytes, /) -> bytes:
    """``header``, or other JSON, whose own digits are zeros, with its digits."""
    own = digest(header).encode()
    return _SEAL.sub(lambda match: match[1] + own + b'"', header, count=1)


def is_whole(header: bytes, /) -> bool:
    """Whether a header, or other JSON, agrees with its digits; true without any."""
    found = _SEAL.search(header)
    if found is None:
        return True
    zeroed = header[: found.start(2)] + BLANK.encode() + header[found.end(2) :]
    return digest(zeroed) == found[2].decode()


def parse(text: str | None, sizes: Mapping[str, int], /) -> dict[str, str]:
    """The digits by array. Raises ValueError if they are not those of arrays of these ``sizes``, in elements."""
    if text is None:
        return {}
    sums = parse_json(text)
    if not isinstance(sums, dict) or any(len(sums.get(name, "")) != len(blank(size)) for name, size in sizes.items()):
        raise ValueError("checksums of other arrays")
    return sums


def agrees(sums: str, start: int, values: np.ndarray, size: int, /) -> bool:
    """Whether all pieces that ``values``, the elements from ``start`` on of an array of ``size``, hold in full agree
    with ``sums``, the digits of the array."""
    first, stop = -(-start // PIECE), start + values.size
    last = -(-size // PIECE) if stop == size else stop // PIECE
    for piece in range(first, last):
        part = values[piece * PIECE - start : (piece + 1) * PIECE - start]
        if digest(part.view(np.uint8).data) != sums[piece * _DIGITS : (piece + 1) * _DIGITS]:
            return False
    return True
