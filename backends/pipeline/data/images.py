"""Encoded 8-bit images as arrays: decoded by Pillow, and checked as they are read.

Opening reads the headers of a sample. Each image is checked again when it is decoded; if one is at fault, all headers
are read and every fault is named at once.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from edm2_core.errors import InputError

from .files import Files

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    InputError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Errors of Pillow on files that are broken, or not images."""
MAX_SIDE = 1 << 14
_SAMPLE, _NAMED = 256, 5


class Header(NamedTuple):
    """Height, width and channels of an image, and bits of a channel."""

    height: int
    width: int
    channels: int
    bits: int

    def __str__(self) -> str:
        kind = "grey" if self.channels == 1 else "colour"
        return f"{self.width}x{self.height} {kind}" + f" of {self.bits} bits" * (self.bits != 8)


def header(image: Image.Image, /) -> Header:
    """Of an image as it would be decoded: grey with or without alpha has one channel, all else three."""
    deep = image.mode == "F" or image.mode.startswith("I")
    return Header(image.height, image.width, 1 if deep or image.mode in ("1", "L", "LA") else 3, 16 if deep else 8)


class EncodedImages:
    """uint8 [channels, height, width] of the image files at ``indices`` of ``files``.

    Raises:
        InputError: images that cannot be read, or that differ in size, channels or bits: all faults of the sample, and
            later of the whole set, in one message.
    """

    def __init__(self, files: Files, indices: Sequence[int]) -> None:
        self.files, self.indices = files, indices
        self._seen: set[str] = set()  # formats of the headers that were read: Pillow tries these first
        sample = range(0, len(indices), max(len(indices) // _SAMPLE, 1))
        found = Counter(got for i in sample if isinstance(got := self._header(i), Header))
        self.header = found.most_common(1)[0][0] if found else None
        if faults := list(self.faults(sample)):
            if len(sample) < len(indices):
                faults = list(self.faults(range(len(indices))))
            raise self._error(faults)
        if max(self.required.height, self.required.width) > MAX_SIDE:
            raise InputError(
                f"images must be at most {MAX_SIDE} pixels wide and high, got {self.required}: resize them"
            )

    @property
    def required(self) -> Header:
        """What all images must be."""
        assert self.header is not None  # the constructor raises where no image can be read
        return self.header

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.required.channels, self.required.height, self.required.width)

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int, /) -> str:
        return f"{self.files.path}/{self.files.names[self.indices[index]]}"

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """uint8 [n, channels, height, width]."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        for image, index in zip(images, indices, strict=True):
            image[:] = self._pixels(int(index))
        return images

    def faults(self, indices: Sequence[int], /) -> Iterator[tuple[int, str]]:
        """The images of which header or file is at fault, each with the reason."""
        for index in indices:
            got = self._header(index)
            if isinstance(got, str):
                yield index, got
            elif got != self.header:
                yield index, f"is {got}"

    def _header(self, index: int) -> Header | str:
        try:
            with self._open(index) as image:
                self._seen.add(image.format or "")
                return header(image)
        except UNREADABLE as error:
            return _reason(error)

    def _open(self, index: int) -> Image.Image:
        content = BytesIO(self.files.read(self.indices[index]))
        try:
            return Image.open(content, formats=tuple(self._seen) or None)
        except UnidentifiedImageError:
            return Image.open(content)

    def _pixels(self, index: int) -> np.ndarray:
        mode = "L" if self.required.channels == 1 else "RGB"
        try:
            with self._open(index) as image:
                if header(image) != self.header:
                    raise self._error(list(self.faults(range(len(self)))))
                if image.mode != mode:
                    image.info.pop("transparency", None)  # of a palette: convert() would warn about it
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        except InputError:
            raise
        except UNREADABLE as error:
            faults = dict(self.faults(range(len(self)))) | {index: _reason(error)}
            raise self._error(sorted(faults.items())) from error
        return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)

    def _error(self, faults: Sequence[tuple[int, str]]) -> InputError:
        named = "; ".join(f"{self.where(index)} {reason}" for index, reason in faults[:_NAMED])
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        wanted = f"like most of them, {self.header}" if self.header else "images that Pillow can read"
        return InputError(
            f"images must all be {wanted}, got {len(faults)} of {len(self)} that are not: {named}{more}: make them "
            "alike with edm2 dataset convert, or remove them"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        return "is not an image that Pillow can read"
    return f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})"


class DeepImages(EncodedImages):
    """float32 [channels, height, width] of images of 16 bits or floats, such as PNG and TIFF, with one channel."""

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """float32 [n, 1, height, width]."""
        images = np.empty((len(indices), *self.shape), np.float32)
        for image, index in zip(images, indices, strict=True):
            image[0] = self._values(int(index))
        return images

    def _values(self, index: int) -> np.ndarray:
        try:
            with self._open(index) as image:
                if header(image) == self.header:
                    return np.asarray(image).astype(np.float32)
        except UNREADABLE as error:
            raise self._error([(index, _reason(error))]) from error
        raise self._error(list(self.faults(range(len(self)))))
