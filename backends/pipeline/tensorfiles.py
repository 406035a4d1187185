"""How do named arrays and a little text lie in one safetensors file, and what is wrong with a file that does not load?

The format: eight bytes with the length of the header, the header in JSON (for each array its dtype, shape and place,
and the text), the arrays one after the other. We write it ourselves, array by array, because the library's writer
first makes a second copy of everything, and takes the memory of a transposed view as it lies. Reading is the
library's, after a look at the header that can tell which array is cut short.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from edm2_core.errors import InputError

from .files import write_atomically

_CODES = {"F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?"}
_CODES |= {f"{kind.upper()}{8 * size}": f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
DTYPES = {name: np.dtype(code) for name, code in _CODES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the library's limit


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write ``arrays`` (of :data:`DTYPES`; any strides and byte order) and ``metadata`` to ``path``, all or nothing."""
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # the widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("=")],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            little_endian = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), order="C", copy=False)
            file.write(little_endian.data)

    write_atomically(path, write)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's entry for each array, and the metadata, of a file that is as long as it says; reads no array.

    Raises:
        InputError: no such file, not a safetensors file, cut short, too long, or an array of a kind we never store.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _parse(path, file, size)
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got '{error.strerror}': check the path") from error
    try:
        metadata = dict(header.pop("__metadata__", {}))
        _check_sizes(path, header, size - start)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _not_safetensors(path) from error
    return header, metadata


def read_metadata_of(path: Path, *, kind: str, version: int) -> dict[str, str]:
    """The metadata of a file whose ``format`` is ``kind``, in ``version`` or an earlier one.

    Raises:
        InputError: as :func:`read_header`, another format, or a newer version.
    """
    _, metadata = read_header(path)
    if (found := metadata.get("format")) != kind:
        raise InputError(f"{path} must have the format {kind}, got {found or 'none'}: choose another file")
    if not (number := metadata.get("version", "")).isdecimal() or int(number) > version:
        raise InputError(f"{path} must have {kind} version {version} or less, got {number!r}: install a newer edm2")
    return metadata


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
    try:
        return dict(json.loads(text)), 8 + length
    except (TypeError, ValueError) as error:
        raise _not_safetensors(path) from error


def _not_safetensors(path: Path) -> InputError:
    return InputError(f"{path} must be a safetensors file, got something else: choose a file that edm2 wrote")


def _check_sizes(path: Path, entries: Mapping[str, Any], actual: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: arrays must be {', '.join(DTYPES)}, got {name} as {entry['dtype']}: convert it first"
            )
        start, end = entry["data_offsets"]
        need = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if end - start != need:
            raise InputError(
                f"{path}: {name} must have {need} bytes, got {end - start}: the file is damaged, copy it again"
            )
        if end > actual:
            raise InputError(
                f"{path}: {name} must have {need} bytes, got {max(actual - start, 0)}: it is cut short, copy it again"
            )
    if end != actual:
        raise InputError(f"{path} must have {end} bytes of arrays, got {actual}: it is damaged, copy it again")


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[list[str], Callable[[str], np.ndarray]]]:
    """The names of the arrays in a file and a function that reads one of them, as it is stored."""
    entries, _ = read_header(path)
    try:
        with safe_open(path, framework="np") as file:
            yield list(entries), file.get_tensor
    except SafetensorError as error:
        raise InputError(f"{path} must be a sound safetensors file, got '{error}': copy it again") from error
