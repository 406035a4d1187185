"""Reading and writing safetensors files: named arrays and text metadata in one file.

The format: eight bytes with the length of the header, the header in JSON (dtype, shape and position of each array, and
the metadata, :mod:`.checksums` among them), then the arrays. This module replaces the safetensors library because that
copies all arrays before it writes, stores transposed views in their memory order, and cannot read part of an array or
bfloat16 into NumPy.
"""

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from . import checksums
from .atomic import write_atomically

_CODES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "BOOL": "?"}
_CODES |= {f"{kind.upper()}{8 * size}": f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
DTYPES = {name: np.dtype(code).newbyteorder("<") for name, code in _CODES.items()}
BFLOAT16 = np.dtype("V2")
"""bfloat16, which NumPy lacks: two bytes an element, of no type."""
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"} | {BFLOAT16: "BF16"}
FLOATING = ("F64", "F32", "F16", "BF16")
_LONGEST_HEADER = 100_000_000  # the format's limit


@dataclass(frozen=True)
class Entry:
    """An array in a file: its dtype (a key of :data:`DTYPES`), its shape, and the byte of the file where it begins."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATING


def dtype_name(array: np.ndarray, /) -> str:
    """The file format's name for the dtype of ``array``, whose byte order does not matter."""
    try:
        return _NAMES[array.dtype.newbyteorder("<")]
    except KeyError:
        raise InputError(f"arrays must be {', '.join(DTYPES)} to be stored, got {array.dtype}: convert it") from None


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write ``arrays`` (of any strides and byte order) and ``metadata`` to ``path``, all or nothing."""
    kinds = {name: (dtype_name(array), array.shape) for name, array in arrays.items()}

    def stored(name: str) -> np.ndarray:
        dtype = BFLOAT16 if kinds[name][0] == "BF16" else DTYPES[kinds[name][0]]
        return arrays[name].astype(dtype, order="C", copy=False)

    sums = {name: checksums.of_array(stored(name)) for name in arrays}
    text, entries = layout(kinds, metadata, sums=sums)

    def write(file: BinaryIO) -> None:
        file.write(text)
        for name in entries:
            file.write(stored(name).data)

    write_atomically(path, write)


def layout(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    sums: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file with arrays of these dtypes and shapes, and the entries in the file's order.

    ``sums``: checksums by array, of :mod:`.checksums`. None: zeros in their place, to be replaced by another header of
    the same length when the arrays are written.
    """
    ordered = sorted(arrays, key=lambda name: (-DTYPES[arrays[name][0]].itemsize, name))  # keeps all aligned
    entries, end = {}, 0
    for name in ordered:
        entries[name] = Entry(*arrays[name], end)
        end += entries[name].nbytes
    sums = {name: sums[name] if sums else checksums.blank(entry.size) for name, entry in entries.items()}
    own = {checksums.KEY: json.dumps(sums), checksums.OF_HEADER: checksums.BLANK}
    header: dict[str, Any] = {"__metadata__": {**metadata, **own}}
    for name, entry in entries.items():
        where = [entry.offset, entry.offset + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": where}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    shifted = {name: Entry(entry.dtype, entry.shape, start + entry.offset) for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + checksums.sealed(text), shifted


class Reader(Protocol):
    """Arrays by name that can be read in parts, from any thread; a :class:`TensorFile` for example."""

    @property
    def path(self) -> Path: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        """See :meth:`TensorFile.fill`."""


def read_array(reader: Reader, name: str, /, *, exactly: bool = False) -> np.ndarray:
    """One array in its stored dtype; bfloat16 becomes float32, or :data:`BFLOAT16` where ``exactly``."""
    entry = reader.entries[name]
    array = np.empty(entry.size, DTYPES[entry.dtype])
    reader.fill(array, name, 0)
    if entry.dtype == "BF16" and exactly:
        array = array.view(BFLOAT16)
    elif entry.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(entry.shape)


class FileReader:
    """Arrays that lie in the file at ``path`` where ``entries`` say; ``sums`` are the checksums of those that have."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], *, sums: Mapping[str, str] | None = None) -> None:
        self.path, self.entries, self._sums = path, entries, sums or {}

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        """Fill ``out`` with the elements of the flattened array from ``start`` on, in their stored dtype.

        ``out`` is 1-D and contiguous; its dtype is the entry's in :data:`DTYPES`.

        Raises:
            InputError: the file was removed or has become shorter since it was opened, has other bytes than were
                written, or cannot be read.
        """
        entry, got = self.entries[name], 0
        view, at = out.view(np.uint8).data, entry.offset + start * out.itemsize
        try:
            while got < len(view) and (count := os.preadv(self._descriptor, [view[got:]], at + got)):
                got += count
        except FileNotFoundError as error:
            raise InputError(
                f"{self.path} must stay until it is read, got none any more: a training with a snapshot plan may have "
                "removed it, give the command again"
            ) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if got < len(view):
            raise InputError(
                f"{self.path}: {name} must have {entry.nbytes} bytes, got fewer: it is cut short, copy it again"
            )
        if name in self._sums and not checksums.agrees(self._sums[name], start, out, entry.size):
            raise InputError(
                f"{self.path}: {name} must have the bytes that were written, got others: the file is damaged, copy it "
                "again"
            )

    def hold(self) -> None:
        """Read from now on the file that is there now, also when another takes its place."""
        _ = self._descriptor

    @cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


class TensorFile(FileReader):
    """The arrays of a safetensors file, of which the header is read now and once. ``seal`` is the header's checksum, or
    None.

    Raises:
        InputError: no such file, not a safetensors file, cut short, too long, or an array of an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        entries, metadata = read_header(path)
        own = {key: metadata.pop(key, None) for key in (checksums.KEY, checksums.OF_HEADER)}
        try:
            sums = checksums.parse(own[checksums.KEY], {name: entry.size for name, entry in entries.items()})
        except (TypeError, ValueError) as error:
            raise _damaged_header(path) from error
        self.metadata, self.seal = metadata, own[checksums.OF_HEADER]
        super().__init__(path, entries, sums=sums)

    def digest(self, name: str, /) -> str | None:
        """The checksum of an array, of :mod:`.checksums`; None in files without."""
        return self._sums.get(name)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a file whose length agrees with its header; reads no array.

    Raises:
        InputError: as :class:`TensorFile`.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _parse(path, file, size)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        metadata = dict(header.pop("__metadata__", {}))
        _check_sizes(path, header, size - start)
        entries = {n: Entry(e["dtype"], tuple(e["shape"]), start + e["data_offsets"][0]) for n, e in header.items()}
        return entries, metadata
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _not_safetensors(path) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} must be a file that can be read, got '{error.strerror}': check the path")


def check_format(file: TensorFile, *, kind: str, version: int) -> None:
    """Raise InputError unless the file's metadata have the format ``kind``, in ``version`` or an earlier one."""
    if (format_ := file.metadata.get("format")) != kind:
        raise InputError(f"{file.path} must have the format {kind}, got {format_ or 'none'}: choose another file")
    if not (number := file.metadata.get("version", "")).isdecimal() or int(number) > version:
        raise InputError(
            f"{file.path} must have {kind} version {version} or less, got {number!r}: install a newer edm2"
        )


def _parse(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length < 2 or length > _LONGEST_HEADER:
        raise _not_safetensors(path)
    text = file.read(length)
    if len(text) < length:
        if not text.startswith(b"{"):
            raise _not_safetensors(path)
        raise InputError(
            f"{path} must have a header of {length} bytes, got {len(text)}: it is cut short, copy it again"
        )
    if not checksums.is_whole(text):
        raise _damaged_header(path)
    try:
        return dict(parse_json(text)), 8 + length
    except (TypeError, ValueError) as error:
        raise _not_safetensors(path) from error


def _damaged_header(path: Path) -> InputError:
    return InputError(
        f"{path} must have the header that was written, got another one: the file is damaged, copy it again"
    )


def _not_safetensors(path: Path) -> InputError:
    return InputError(f"{path} must be a safetensors file, got something else: choose a file that edm2 wrote")


def _check_sizes(path: Path, entries: Mapping[str, Any], actual: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: arrays must be {', '.join(DTYPES)}, got {name} as {entry['dtype']}: convert it first"
            )
        begin, (start, end) = end, entry["data_offsets"]
        need = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if end - start != need or start != begin:
            raise InputError(
                f"{path}: {name} must have {need} bytes from {begin} on, got {start} to {end}: "
                "the file is damaged, copy it again"
            )
        if end > actual:
            raise InputError(
                f"{path}: {name} must have {need} bytes, got {max(actual - start, 0)}: it is cut short, copy it again"
            )
    if end != actual:
        raise InputError(f"{path} must have {end} bytes of arrays, got {actual}: it is damaged, copy it again")
