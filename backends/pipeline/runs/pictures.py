"""PNG files of samples: one per image, a grid, or labelled rows.

Images are uint8 [n, channels, height, width], grey or RGB. Small ones are enlarged by repeating pixels.
"""

import os
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backends.pipeline.checkpoints.atomic import write_atomically
from edm2_core.codec import SIGMA_DATA, DataFormat
from edm2_core.errors import InputError

_VISIBLE = 48  # least size of an image in a grid, in pixels
_GAP = 4
_MARGIN = 12
_FAR = np.float32(1e6)  # beyond all data, in standard deviations
_PAPER, _INK = "white", "#24292f"


def visible(samples: np.ndarray, format: DataFormat, /) -> np.ndarray:
    """Samples as a network makes them, float32 [n, channels, height, width], as pictures, uint8 [n, 1 or 3, ...].

    8-bit images are what they are, rounded and clipped; values that are not finite become 0. Of other data, three
    channels, or the first one, are shown from -3 to 3 standard deviations.
    """
    shown = samples if samples.shape[1] == 3 else samples[:, :1]
    bounded = np.where(np.isfinite(shown), shown, -_FAR).clip(-_FAR, _FAR)
    if format.codec.stored == "uint8":
        return to_uint8(format.codec.decode(bounded))
    return to_uint8(127.5 + bounded * (127.5 / (3 * SIGMA_DATA)))


def to_uint8(values: np.ndarray, /) -> np.ndarray:
    """Values from 0 to 255, rounded and clipped; those that are not finite become 0."""
    return np.rint(np.where(np.isfinite(values), values, 0).clip(0, 255)).astype(np.uint8)


def save_images(paths: Sequence[Path], images: np.ndarray, /) -> None:
    """Write one PNG per image, in its own size. Raises InputError as :func:`save_grid`."""
    for path, image in zip(paths, images, strict=True):
        _save(path, _picture(image))


def load_images(paths: Sequence[Path], /) -> np.ndarray:
    """What :func:`save_images` wrote, uint8 [n, 1 or 3, height, width]."""
    images = []
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return np.stack(images)


def save_grid(
    path: str | os.PathLike[str], images: np.ndarray, *, columns: int | None = None, scale: int | None = None
) -> None:
    """Write all images into one PNG, row by row, in a grid of ``columns``; by default the grid is about square.

    ``scale`` is an integer factor of enlargement; by default images become at least 48 pixels wide or high.

    Raises:
        InputError: the images are neither grey nor RGB, or cannot be written.
    """
    columns = columns or max(ceil(sqrt(len(images))), 1)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    _save(path, _table([("", row) for row in rows], scale))


def save_rows(
    path: str | os.PathLike[str], rows: Sequence[tuple[str, np.ndarray]], *, scale: int | None = None
) -> None:
    """Write one PNG with a row for each (label, images), the label on the left.

    ``scale`` and errors are those of :func:`save_grid`.
    """
    _save(path, _table(rows, scale))


def _table(rows: Sequence[tuple[str, np.ndarray]], scale: int | None) -> Image.Image:
    height, width = rows[0][1].shape[2:]
    scale = scale or ceil(_VISIBLE / max(height, width))
    cell_width, cell_height = width * scale, height * scale
    font = ImageFont.load_default(size=min(max(cell_height * 3 // 8, 14), 40))
    text_width = ceil(max(font.getlength(label) for label, _ in rows))
    left = _MARGIN + (text_width + _MARGIN if text_width else 0)
    pitch = max(cell_height, ceil(sum(font.getmetrics()))) if text_width else cell_height  # type: ignore[union-attr]
    columns = max(len(images) for _, images in rows)
    row_gap = 2 * _GAP if text_width else _GAP  # labelled rows are farther apart
    size = (
        left + columns * (cell_width + _GAP) - _GAP + _MARGIN,
        _MARGIN + len(rows) * (pitch + row_gap) - row_gap + _MARGIN,
    )
    table = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(table)
    for i, (label, images) in enumerate(rows):
        top = _MARGIN + i * (pitch + row_gap)
        draw.text((left - _MARGIN, top + pitch / 2), label, fill=_INK, font=font, anchor="rm")
        for j, image in enumerate(images):
            cell = _picture(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            table.paste(cell, (left + j * (cell_width + _GAP), top + (pitch - cell_height) // 2))
    return table


def _picture(image: np.ndarray) -> Image.Image:
    channels = len(image)
    if channels not in (1, 3):
        raise InputError(f"a PNG must have 1 or 3 channels, got {channels}: use --format npz")
    return Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _save(path: str | os.PathLike[str], picture: Image.Image) -> None:
    write_atomically(path, lambda file: picture.save(file, format="PNG"))
