"""How a picture of any kind becomes one of a training set: its orientation, colours and size.

Cuts and scales are named as in the dataset tools of EDM and ADM, whose documentation they follow.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageOps

from edm2_core.errors import InputError

_ORIENTATION = 0x0112  # the EXIF tag

Transform = Literal["center-crop", "center-crop-wide", "center-crop-dhariwal", "fit"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What :func:`transformed` makes.

    ``size``: width and height; None: as it is. ``transform``: None: pictures must have the size already. ``grey``: one
    channel instead of three. ``background``: the colour beneath transparent pixels and around fitted pictures.

    Raises:
        InputError: a transform without a size, or one that cannot make this size; an unknown colour.
    """

    size: tuple[int, int] | None = None
    transform: Transform | None = None
    grey: bool = False
    background: str = "black"

    def __post_init__(self) -> None:
        if self.transform is not None and self.size is None:
            raise InputError(f"--transform {self.transform} needs a --resolution such as 64x64, got none: add it")
        if self.transform == "center-crop-dhariwal" and self.size is not None and self.size[0] != self.size[1]:
            raise InputError(
                f"center-crop-dhariwal makes squares, got {self.size[0]}x{self.size[1]}: use center-crop for rectangles"
            )
        if self.transform == "center-crop-wide" and self.size is not None and self.size[1] > self.size[0]:
            raise InputError(
                f"center-crop-wide needs a width of at least the height, got {self.size[0]}x{self.size[1]}: use "
                "center-crop for upright pictures"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise InputError(
                f"--background must be a colour such as white or #ff8800, got {self.background!r}"
            ) from error


def transformed(content: bytes | memoryview, settings: Settings, /) -> bytes:
    """An encoded picture as an uncompressed PNG of the wanted size and colours, without metadata.

    The first frame of an animation is taken; EXIF orientation is applied; 16-bit grey becomes 8-bit.

    Raises:
        InputError: a picture of another size, without a transform.
        OSError, ValueError, ...: as Pillow, on a picture that is broken, or of more pixels than its limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(BytesIO(content))
    with image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow: I
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image  # it copies what stands upright
        upright.load()
    if upright.mode == "F" or upright.mode.startswith("I"):
        upright = _grey_of_8_bits(upright, deep=deep)
    flat = _flat(upright, settings)
    sized = _sized(flat, settings)
    with BytesIO() as file:
        sized.save(file, format="PNG", compress_level=0)
        return file.getvalue()


def _grey_of_8_bits(image: Image.Image, *, deep: bool) -> Image.Image:
    """Of integers or floats in one channel. ``deep``: their range is that of 16 bits, however dark the picture is."""
    values = np.asarray(image).astype(np.float64)
    deep = deep or (image.mode == "I" and values.max(initial=0) > 255)
    if not ((values >= 0) & (values <= (65535 if deep else 255))).all():  # so are nan
        raise ValueError(f"values outside 0 to {65535 if deep else 255}")
    return Image.fromarray((values / 257 if deep else values).round().astype(np.uint8))


def _flat(image: Image.Image, settings: Settings) -> Image.Image:
    """In RGB or grey, without transparency."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, settings.background)
        image.alpha_composite(above)
    wanted = "L" if settings.grey else "RGB"
    return image if image.mode == wanted else image.convert(wanted)  # which copies too


def _sized(image: Image.Image, settings: Settings) -> Image.Image:
    size = settings.size
    match settings.transform:
        case None:
            if size is not None and image.size != size:
                raise InputError(f"is {image.width}x{image.height}, not {size[0]}x{size[1]}: name a --transform")
            return image
        case "center-crop":
            return ImageOps.fit(image, _known(size), Image.Resampling.LANCZOS)
        case "center-crop-wide":
            width, height = _known(size)
            wide = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            return _on_canvas(wide, (width, width), "black")
        case "center-crop-dhariwal":
            return _dhariwal(image, _known(size)[0])
        case "fit":
            fitted = ImageOps.contain(image, _known(size), Image.Resampling.LANCZOS)
            return _on_canvas(fitted, _known(size), settings.background)


def _known(size: tuple[int, int] | None) -> tuple[int, int]:
    assert size is not None  # Settings refuses a transform without one
    return size


def _on_canvas(image: Image.Image, size: tuple[int, int], colour: str) -> Image.Image:
    canvas = Image.new("RGB", size, colour).convert(image.mode)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _dhariwal(image: Image.Image, side: int) -> Image.Image:
    """Halved by a box filter while at least twice as large, scaled bicubically, then cut. Source: arXiv 2105.05233."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
