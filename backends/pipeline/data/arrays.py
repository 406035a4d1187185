"""Float arrays as data: one array of all samples, or a file for each.

Axes are [N, C, H, W], or [N, H, W, C] where the last is the shortest of the three, or [N, H, W] of one channel; those
of a file are the same without N. ``edm2 dataset info`` shows what was understood; a :data:`Layout` insists.
"""

import mmap
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.pipeline.checkpoints.safetensors_io import DTYPES, read_header
from edm2_core.errors import InputError

from .files import Files, Zip, unreadable

_MAGIC = b"\x93NUMPY"
_AXES = 3  # of one sample
Layout = Literal["chw", "hwc"]
"""Whether channels come first or last; None: by the sizes."""


def from_npy(content: bytes | memoryview | mmap.mmap, where: str | Path, /) -> np.ndarray:
    """The array in the bytes of a .npy file, which it shares. Raises InputError unless they are one of numbers."""
    try:
        if bytes(content[:6]) != _MAGIC:
            raise ValueError("not an .npy file")
        wide = content[6] >= 2
        size = int.from_bytes(bytes(content[8 : 12 if wide else 10]), "little")
        start = (12 if wide else 10) + size
        described = literal_eval(bytes(content[start - size : start]).decode("latin1"))
        dtype, shape = np.dtype(described["descr"]), tuple(described["shape"])
        if dtype.kind not in "fiub" or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"an array of {dtype}")
        count = int(np.prod(shape, dtype=object))
        if len(content) < start + count * dtype.itemsize:
            raise ValueError("an array that is cut off")
        flat = np.frombuffer(content, dtype, count, start)
        return flat.reshape(shape, order="F" if described["fortran_order"] else "C")
    except (ValueError, SyntaxError, KeyError, TypeError, IndexError, MemoryError, RecursionError) as error:
        raise unreadable(where, error) from error


def channels_first(array: np.ndarray, /, layout: Layout | None = None, *, axes: int = _AXES) -> np.ndarray:
    """A view of samples [..., C, H, W] of an array with one of the axes above, ``axes`` in all."""
    if array.ndim == axes - 1:
        return array[..., None, :, :]
    if layout == "hwc" or (layout is None and array.shape[-1] < min(array.shape[-3:-1])):
        return np.moveaxis(array, -1, -3)
    return array


class OneArray:
    """Samples along the first axis of one array, which may be mapped from a file."""

    def __init__(self, array: np.ndarray, path: Path, part: str = "", layout: Layout | None = None) -> None:
        if array.ndim not in (3, 4) or not len(array) or 0 in array.shape:
            raise InputError(
                f"an array of data must be [N, C, H, W], [N, H, W, C] or [N, H, W], got shape {array.shape} in {path}: "
                "reshape it"
            )
        self.path, self._part, self._layout = path, part, layout
        self._array = channels_first(array, layout, axes=4)
        self.shape: tuple[int, int, int] = self._array.shape[1:]
        self.pixels = array.dtype == np.uint8 and self.shape[0] in (1, 3)

    def __len__(self) -> int:
        return len(self._array)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_part": self._part, "_layout": self._layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        array = arrays_in(state["path"])[state["_part"]]
        self.__init__(array, state["path"], state["_part"], state["_layout"])  # type: ignore[misc]

    def where(self, index: int, /) -> str:
        return f"{self.path}, sample {index}"

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """uint8 of 8-bit images, grey or RGB, else float32, [n, C, H, W]."""
        return np.ascontiguousarray(self._array[indices], np.uint8 if self.pixels else np.float32)


class ArrayFiles:
    """A sample in each of the .npy files at ``indices`` of ``files``, as float32 [C, H, W]."""

    def __init__(self, files: Files, indices: Sequence[int], *, layout: Layout | None = None) -> None:
        self.files, self.indices, self._layout = files, indices, layout
        self.shape: tuple[int, int, int] = self._array(0).shape

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int, /) -> str:
        return f"{self.files.path}/{self.files.names[self.indices[index]]}"

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """float32 [n, C, H, W]."""
        samples = np.empty((len(indices), *self.shape), np.float32)
        for sample, index in zip(samples, indices, strict=True):
            array = self._array(int(index))
            if array.shape != self.shape:
                raise InputError(
                    f"arrays of data must have one shape, got {array.shape} in {self.where(int(index))} for "
                    f"{self.shape} in {self.where(0)}: make them alike"
                )
            sample[:] = array
        return samples

    def _array(self, index: int) -> np.ndarray:
        array = from_npy(self.files.read(self.indices[index]), self.where(index))
        if array.ndim not in (2, 3) or not array.size:
            raise InputError(
                f"an array of a sample must be [C, H, W], [H, W, C] or [H, W], got shape {array.shape} in "
                f"{self.where(index)}: reshape it"
            )
        return channels_first(array, self._layout)


def arrays_in(path: Path, /) -> dict[str, np.ndarray]:
    """The arrays in a .npy (called ""), .npz or .safetensors file, mapped where the file allows it.

    Raises:
        InputError: the file is damaged.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        members = Zip(path)
        return {
            name.removesuffix(".npy"): from_npy(members.read(i), f"{path}/{name}")
            for i, name in enumerate(members.names)
        }
    entries = {} if suffix == ".npy" else read_header(path)[0]
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if suffix == ".npy":
        return {"": from_npy(content, path)}
    if narrow := [name for name, entry in entries.items() if entry.dtype == "BF16"]:
        raise unreadable(path, f"{narrow[0]} is bfloat16, which NumPy lacks: store it in float32")
    return {name: np.ndarray(e.shape, DTYPES[e.dtype], content, e.offset) for name, e in entries.items()}
