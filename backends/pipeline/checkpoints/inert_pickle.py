"""Reading pickles of official EDM2 networks and statistics: nothing in them is executed, and no weight is copied.

The names in a pickle decide which code runs while it is read: here each allowed name stands for an inert function or
class of this module (:data:`ALLOWED`), and any other name ends the reading.

A storage is a file of PyTorch's own inside the pickle, as bytes. The unpickler asks for large bytes one by one; it is
given memory that holds only their place in the file, so that arrays can be read from there when they are needed.
"""

import gc
import math
import mmap
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from edm2_core.errors import InputError

from .safetensors_io import DTYPES, Entry

_NUMBERING = ("PUT", "BINPUT", "LONG_BINPUT")
_LEFT_IN_PLACE = 1 << 16  # bytes objects of this size or more, which pickles hold outside of frames
_MARK = b"edm2: left in its place in the file, at byte "
_HEADER = 1 << 10  # bytes of a storage's archive that surely hold all before its numbers
# of the pickles that come first: byte order, dtype, and the list of the one storage's key, after which its length comes
_ARCHIVE = re.compile(rb"little_endianq.\x88.*?ctorch\n(\w+)Storage\n.*?\]q\x00X.{4}\d+q\x01a\.", re.DOTALL)
_CODES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32"}
_CODES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}


@dataclass
class Module:
    """A module of the network: the name of its class, and its attributes, which include its modules and arrays."""

    class_name: str = ""
    state: Mapping[str, Any] = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        self.class_name, self.state = "ModuleDict", dict(state)

    def part(self, name: str) -> Mapping[str, Any]:
        value = (self.state or {}).get(name)
        return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Stored:
    """The numbers of a storage or of an array: where they are in the file, or, if they are small, themselves, [n]."""

    entry: Entry
    values: np.ndarray | None = None


class Values:
    """An array of NumPy: ``array`` is set while it is read."""

    def __init__(self, file: "_InPlace") -> None:
        self._file = file
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, tuple[int, ...], "_DType", bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(data, bytes):
            raise ValueError("an array of objects")
        flat = np.frombuffer(self._file.whole(data), dtype.dtype)
        count, _ = _contiguous(tuple(shape))
        if count != flat.size:
            raise ValueError("an array of another length than it says")
        self.array = flat.reshape(shape, order="F" if fortran else "C")


class _DType:
    """A dtype of NumPy, by its code: numbers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch("[fiub][1248]|b1", code):
            raise ValueError(f"an array of dtype {code!r:.20}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _EasyDict(dict[str, Any]):
    """A dict; attributes that a pickle sets on it have no effect."""


def _module(meta: Mapping[str, Any]) -> Module:
    return Module(str(meta["class_name"]), dict(meta["state"]))


def _parameter(array: Stored, *_: Any) -> Stored:
    return array


class _Refused(Exception):
    """A name that is not in the table."""


class _InPlace:
    """A file whose large reads return only the place of what would have been read. It has no ``peek``, with which the
    unpickler would read ahead, and copy."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self.read, self.readline = file.read, file.readline

    def readinto(self, buffer: Any, /) -> int:
        view, at = memoryview(buffer).cast("B"), self._file.tell()
        if len(view) < _LEFT_IN_PLACE:
            return self._file.readinto(view)  # type: ignore[attr-defined]
        end = self._file.seek(min(at + len(view), self._size))
        mark = _MARK + at.to_bytes(8, "little")
        view[: len(mark)] = mark
        return end - at

    def whole(self, data: bytes) -> bytes:
        """Bytes that were read, or that were left in their place."""
        return self.at(_place(data), len(data)) if data.startswith(_MARK) else data

    def at(self, start: int, length: int) -> bytes:
        """Bytes from another place."""
        here = self._file.tell()
        self._file.seek(start)
        data = self._file.read(length)
        self._file.seek(here)
        return data


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: _InPlace) -> None:
        super().__init__(file)
        self._file = file
        self._methods = {
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
        }

    def find_class(self, module: str, name: str, /) -> Any:
        older = module.replace("numpy._core", "numpy.core")  # the name before NumPy 2
        allowed = ALLOWED | self._methods
        if (older, name) not in allowed:
            raise _Refused(f"{module}.{name}")
        return allowed[older, name]

    def _array(self, *_: Any) -> Values:
        return Values(self._file)

    def _scalar(self, dtype: _DType, data: bytes) -> Any:
        return np.frombuffer(self._file.whole(data), dtype.dtype, 1)[0].item()

    def _storage(self, archive: bytes) -> Stored:
        if not archive.startswith(_MARK):
            entry = _entry(archive[:_HEADER], 0, len(archive))
            return Stored(entry, np.frombuffer(archive, DTYPES[entry.dtype], entry.size, entry.offset))
        at = _place(archive)
        return Stored(_entry(self._file.at(at, _HEADER), at, len(archive)))

    def _tensor(self, storage: Stored, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Stored:
        """Part of a storage; a copy unless it is contiguous. Raises ValueError where it reaches beyond the storage."""
        entry, dtype = storage.entry, DTYPES[storage.entry.dtype]
        count, whole = _contiguous(size)
        if not (type(offset) is int and offset >= 0 and offset + count <= entry.size):
            raise ValueError("a tensor that reaches beyond its storage, or is larger")
        if stride == whole:
            part = None if storage.values is None else storage.values[offset : offset + count]
            return Stored(Entry(entry.dtype, size, entry.offset + offset * dtype.itemsize), part)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not all(type(step) is int and step >= 0 for step in stride) or (count and last >= entry.size):
            raise ValueError("a tensor that reaches beyond its storage")
        values = storage.values
        if values is None:
            values = np.frombuffer(self._file.at(entry.offset, entry.nbytes), dtype)
        strides = [step * dtype.itemsize for step in stride]
        copy = np.lib.stride_tricks.as_strided(values[offset:], size, strides).copy()
        return Stored(Entry(entry.dtype, size, 0), copy.reshape(-1))


def _place(mark: bytes) -> int:
    return int.from_bytes(mark[len(_MARK) : len(_MARK) + 8], "little")


@lru_cache
def _contiguous(size: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The number of elements of an array, and its strides if it is contiguous."""
    if not all(type(n) is int and n >= 0 for n in size):
        raise ValueError("a tensor of impossible shape")
    return math.prod(size), tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def _entry(header: bytes, at: int, length: int) -> Entry:
    """Where the numbers of a storage are, whose archive of ``length`` bytes begins at byte ``at`` with ``header``."""
    found = _ARCHIVE.search(header)
    if not found or (kind := found[1].decode()) not in _CODES:
        raise ValueError("a storage that PyTorch did not write")
    begin, code = found.end() + 8, _CODES[kind]  # after the number of elements
    entry = Entry(code, (int.from_bytes(header[begin - 8 : begin], "little"),), at + begin)
    if begin + entry.nbytes != length:
        raise ValueError("a storage of another length than it says")
    return entry


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Bytes in pickles of protocol 2."""
    if encoding != "latin1":
        raise ValueError("bytes in another encoding")
    return text.encode("latin1")


def _device(*words: Any) -> str:
    return ":".join(map(str, words))


class _Inert:
    """A class that is only named, as in the arguments of ``_reconstruct``."""


def check_memo(file: BinaryIO) -> None:
    """A pickle numbers the objects that it names again; for any number the unpickler takes as much memory as if all the
    numbers before were there. Honest ones count from 0, so a number is never beyond the bytes that precede it.

    Raises:
        ValueError: such a number, or a damaged pickle.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for opcode, number, at in pickletools.genops(cast(IO[bytes], _Skimmed(mapped))):
            if opcode.name in _NUMBERING and int(number or 0) > int(at or 0):
                raise ValueError(f"object {number} in {at} bytes")


class _Skimmed:
    """A file whose large reads tell how much there is, and copy nothing."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped, self._at = mapped, 0

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> Any:
        start, self._at = self._at, min(self._at + count, len(self._mapped))
        return self._mapped[start : self._at] if count < _LEFT_IN_PLACE else _Length(self._at - start)

    def readline(self) -> Any:
        end = self._mapped.find(b"\n", self._at) + 1
        return self.read(min((end or len(self._mapped)) - self._at, _LEFT_IN_PLACE - 1))


class _Length:
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def decode(self, *_: Any) -> str:
        return ""


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch.nn.modules.container", "ModuleDict"): Module,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    **{("torch", name): name for name in ("float16", "bfloat16", "float32", "float64", "int64", "uint8")},
    ("numpy", "ndarray"): _Inert,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _bytes,
}
"""What names in a pickle stand for, besides the unpickler's methods; names of NumPy are those before version 2."""


def load(path: Path, /) -> Any:
    """What the pickle at ``path`` holds: plain values, :class:`Module`, :class:`Stored` and :class:`Values`.

    Raises:
        InputError: no such file, a name in it that is not allowed, or a damaged file.
    """
    try:
        with open(path, "rb") as file:
            check_memo(file)
            gc.disable()  # objects are many and all stay: looking for garbage among them takes a quarter of the time
            return _Unpickler(_InPlace(file)).load()
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got '{error.strerror}': check the path") from error
    except _Refused as error:
        raise InputError(
            f"{path} must name only what official EDM2 pickles do, got {error}: it may run code, do not trust it"
        ) from error
    except (Exception, RecursionError) as error:  # many types, depending on the bytes
        why = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"{path} must be an official EDM2 pickle, got a fault, '{why:.160}': copy it again") from error
    finally:
        gc.enable()
