"""Datasets: the digits inside this package, or a folder or .zip of images.

Images are uint8 on disk and in a dataset, [n, channels, resolution, resolution]; a network sees them as float32 from
-1 (0) to 1 (255). Labels are class numbers from 0.
"""

import json
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from edm2_core.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_LABELS = "dataset.json"
_MOST_CLASSES = 1 << 20  # the longest one-hot row; a larger label is an error
# Errors of Pillow and zipfile on broken or unsupported files.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


class Dataset(Protocol):
    """Square images of one size, each with a class if ``label_dim`` is not 0. Threads may share a dataset.

    ``name`` is short, for folders; ``spec`` is what :func:`open_dataset` opens again, or the name if it cannot.
    """

    name: str
    spec: str
    resolution: int
    channels: int
    label_dim: int

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray, /) -> np.ndarray:
        """uint8 [n, channels, resolution, resolution]. Raises InputError where a file cannot be read."""
        ...

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        """Class ids, int64 [n] from 0 to label_dim - 1. Call it only if ``label_dim`` is not 0."""
        ...


def open_dataset(spec: str | os.PathLike[str], /) -> Dataset:
    """The dataset called ``digits``, or the images under a folder or in a .zip.

    Images are found at any depth and ordered by name; hidden files are skipped. Grey images have one channel, all
    others are converted to RGB without alpha. Labels come from ``dataset.json`` at the root, ``{"labels":
    [["cat/1.png", 0], ...]}``, unless it is missing or its labels are null. Opening reads only the headers of images.

    Raises:
        InputError: ``spec`` does not exist or has no images; an image is broken, not square, of more than 8 bits, or
            differs from the others in size or channels; or ``dataset.json`` does not label every image.
    """
    path = Path(spec)
    if os.fspath(spec) == "digits":
        return _Digits()
    if path.is_dir():
        return _ImageFiles(_Folder(path))
    if path.suffix.lower() == ".zip" and path.is_file():
        return _ImageFiles(_Zip(path))
    why = "which is none of these" if path.exists() else "which does not exist"
    raise InputError(f"data must be 'digits', a folder or a .zip of images, got '{path}', {why}: check the path")


def to_model(images: np.ndarray, /) -> np.ndarray:
    """Images as a network takes them: uint8 from 0 to 255 to float32 from -1 to 1, in the same shape."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray, /) -> np.ndarray:
    """The inverse of :func:`to_model`, for any floats: rounded and clipped to uint8; non-finite values become 0."""
    finite = np.where(np.isfinite(images), images, -1).clip(-1, 1)
    return np.rint(finite * 127.5 + 127.5).astype(np.uint8)


class _Digits:
    """The UCI optical digits. See DIGITS.md beside this file."""

    name = spec = "digits"
    resolution = 8
    channels = 1
    label_dim = 10

    def __init__(self) -> None:
        with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
            self._images = np.rint(arrays["images"][:, None] * (255 / 16)).astype(np.uint8)
            self._labels = arrays["labels"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: np.ndarray, /) -> np.ndarray:
        return self._images[indices]

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        return self._labels[indices]


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name

    def names(self) -> list[str]:
        return [file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()]

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        return open(self.path / name, "rb")


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        try:
            self._zip = zipfile.ZipFile(path)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
        self._lock = threading.Lock()  # ZipFile counts its open members without a lock

    def names(self) -> list[str]:
        return [member.filename for member in self._zip.infolist() if not member.is_dir()]

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with self._lock, self._zip.open(name) as file:
            yield cast(BinaryIO, file)


class _ImageFiles:
    def __init__(self, source: _Folder | _Zip) -> None:
        self.name, self.spec = source.name, str(source.path.absolute())
        self._source = source
        names = source.names()
        self._names = sorted(filter(_is_image, names))
        if not self._names:
            raise InputError(
                f"data must hold images ({' '.join(_SUFFIXES)}), got none in {source.path}: check the path"
            )
        self.resolution, self.channels = self._one_format()
        self._labels = _read_labels(source, self._names) if _LABELS in names else None
        self.label_dim = 0 if self._labels is None else int(self._labels.max()) + 1

    def __len__(self) -> int:
        return len(self._names)

    def images(self, indices: np.ndarray, /) -> np.ndarray:
        images = np.empty((len(indices), self.channels, self.resolution, self.resolution), np.uint8)
        for image, index in zip(images, indices, strict=True):
            image[:] = self._pixels(self._names[index])
        return images

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        if self._labels is None:
            raise InputError(f"labels must be in {_LABELS}, {self._source.path} has none: train without labels")
        return self._labels[indices]

    def _one_format(self) -> tuple[int, int]:
        """Resolution and channels of the images, from their headers, which must agree."""
        first, *others = self._names
        size, channels = self._header(first)
        if size[0] != size[1]:
            raise InputError(f"images must be square, got {self._at(first)} of {_by(size)}: crop or pad them")
        for name in others:
            other_size, other_channels = self._header(name)
            if other_size != size:
                raise InputError(
                    f"images must have one size, got {self._at(first)} of {_by(size)} and {self._at(name)} of "
                    f"{_by(other_size)}: resize or crop them"
                )
            if other_channels != channels:
                raise InputError(
                    f"images must be all grey or all colour, got {self._at(first)} with {channels} channels and "
                    f"{self._at(name)} with {other_channels}: convert them"
                )
        return size[0], channels

    def _header(self, name: str) -> tuple[tuple[int, int], int]:
        try:
            with self._source.open(name) as file, Image.open(file) as image:
                size, mode = image.size, image.mode
        except _UNREADABLE as error:
            raise _unreadable(self._at(name), error) from error
        if mode == "F" or mode.startswith("I"):
            raise InputError(f"images must have 8 bits per channel, got {self._at(name)} of mode {mode}: convert them")
        return size, 1 if mode in ("1", "L", "LA") else 3

    def _pixels(self, name: str) -> np.ndarray:
        try:
            with self._source.open(name) as file:
                content = BytesIO(file.read())
            with Image.open(content) as image:  # decoded here, outside the lock of a zip
                image.info.pop("transparency", None)  # of a palette: convert() would warn about it
                pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        except _UNREADABLE as error:
            raise _unreadable(self._at(name), error) from error
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise InputError(f"images must stay as they were when opened, {self._at(name)} changed: start again")
        return pixels.reshape(self.resolution, self.resolution, self.channels).transpose(2, 0, 1)

    def _at(self, name: str) -> str:
        return str(self._source.path / name)


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))  # "._1.png" is metadata of macOS
    return name.lower().endswith(_SUFFIXES) and not hidden


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _unreadable(path: str | Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        reason = "not an image that Pillow can read"
    return InputError(f"data must be readable, got '{reason}' from {path}: replace or remove the file")


def _read_labels(source: _Folder | _Zip, names: Sequence[str]) -> np.ndarray | None:
    """Class ids, int64 [n] in the order of ``names``, or None for null labels. Labels of missing files are ignored."""
    path = source.path / _LABELS

    def fault(got: str) -> InputError:
        rule = f'{path} must be {{"labels": [["folder/image.png", 3], ...]}} or {{"labels": null}}'
        return InputError(f"{rule}, got {got}: correct the file, or remove it to train without labels")

    try:
        with source.open(_LABELS) as file:
            content = json.load(file)
    except _UNREADABLE as error:  # errors of JSON are ValueErrors
        raise fault(f"'{' '.join(str(error).split())}'") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise fault("no 'labels'")
    pairs = content["labels"]
    if pairs is None:
        return None
    if not isinstance(pairs, list):
        raise fault(f"{type(pairs).__name__} as labels")
    table: dict[str, int] = {}
    for pair in pairs:
        match pair:
            case [str(name), int(label)] if not isinstance(label, bool) and 0 <= label < _MOST_CLASSES:
                if table.setdefault(name, label) != label:
                    raise fault(f"both {table[name]} and {label} for {name}")
            case _:
                raise fault(f"{pair!r:.80}")
    for name in names:
        if name not in table:
            raise fault(f"no label for {name}")
    return np.array([table[name] for name in names], np.int64)
