"""Many small files under one path, read by index from several threads or processes: a folder, a .zip or a .tar.

An archive is mapped into memory. Its index is kept as arrays, so that a million files cost little, and a file is cut
out without a lock. Names are those within the folder or archive, with slashes, in sorted order.
"""

import mmap
import os
import struct
import tarfile
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import le
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from edm2_core.errors import InputError

MAX_BYTES = 1 << 28
"""The largest file that is unpacked: a larger one is taken for a decompression bomb."""


class Files(Protocol):
    """``path`` is the folder or archive, ``names`` the sorted names of the files in it. Threads may share it, and it
    can be sent to another process."""

    path: Path
    names: Sequence[str]

    def read(self, index: int, /) -> bytes | memoryview:
        """The content of the file ``names[index]``. Raises InputError if it is damaged."""
        ...


def open_files(path: Path, /) -> Files:
    """The files in a folder, a .zip or an uncompressed .tar; of a folder of .tar files, the files in all of them.

    Raises:
        InputError: a damaged or compressed archive; names that lead out of it; links that lead out of a folder.
    """
    if path.is_dir():
        folder = Folder(path)
        shards = [name for name in folder.names if name.endswith(".tar")]
        if shards and len(shards) == sum(not is_hidden(name) for name in folder.names):
            return Tars(path, [path / name for name in shards])
        return folder
    if _is_tar(path) or _is_compressed(path):
        return Tars(path, [path])
    return Zip(path)


def _is_tar(path: Path) -> bool:
    """Whether it is an uncompressed .tar. ``tarfile.is_tarfile`` would try to decompress anything, with as much memory
    as its first bytes ask for."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError, EOFError):
        return False


def _is_compressed(path: Path) -> bool:
    """Whether it begins as gzip, bzip2, xz or zstd files do."""
    try:
        with open(path, "rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))
    except OSError:
        return False


def find(files: Files, name: str, /) -> int | None:
    """The index of the file ``name``, or None if there is none."""
    index = bisect_left(files.names, name)
    return index if index < len(files.names) and files.names[index] == name else None


def is_hidden(name: str, /) -> bool:
    """Whether a file, or a folder that it is in, is hidden; "._1.png" and __MACOSX are metadata of macOS."""
    return name.startswith((".", "__MACOSX")) or "/." in name or "/__MACOSX" in name


def unreadable(path: str | Path, reason: object, /) -> InputError:
    """The error of a file that cannot be read."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return InputError(f"data must be readable, got '{text}' from {path}: replace or remove the file")


class Folder:
    """The files of a folder, at any depth. Links to files within the folder are followed, links to folders are not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        root = os.path.realpath(path)
        self.names: Sequence[str] = sorted(name for name in _walk(os.fspath(path), "", root))

    def read(self, index: int, /) -> bytes:
        path = self.path / self.names[index]
        try:
            if path.stat().st_size > MAX_BYTES:
                raise unreadable(path, f"more than {MAX_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise unreadable(path, error.strerror or error) from error


def _walk(folder: str, inner: str, root: str) -> Iterator[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise unreadable(folder, error.strerror or error) from error
    for entry in entries:
        name = f"{inner}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{name}/", root)
        elif entry.is_symlink() and not os.path.realpath(entry.path).startswith(root + os.sep):
            raise InputError(
                f"links in a folder of data must lead to files in it, got {entry.path} to "
                f"{os.path.realpath(entry.path)}: copy the file"
            )
        elif entry.is_file():
            yield name


class _Index(NamedTuple):
    """Where the files of archives are, in the order of their names. ``archive``: which of several; ``crc``, ``method``
    and ``size`` (unpacked) are those of a zip."""

    archive: np.ndarray
    start: np.ndarray
    length: np.ndarray
    size: np.ndarray
    method: np.ndarray
    crc: np.ndarray


class _Mapped:
    """Archives mapped into memory; mapped again in another process."""

    def __init__(self, path: Path, archives: Sequence[Path]) -> None:
        self.path, self._archives = path, list(archives)
        self._buffers = [_map(archive) for archive in archives]
        self.names: Sequence[str] = []
        self._index: _Index

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._buffers = [_map(archive) for archive in self._archives]

    def _keep(self, names: list[str], index: _Index) -> None:
        for name in names:
            if (".." in name and ".." in name.split("/")) or name.startswith(("/", "\\")):
                raise InputError(f"names in {self.path} must stay within it, got {name!r:.80}: pack the data anew")
        if all(map(le, names, islice(names, 1, None))):  # as most archives are: copies of millions of names are spared
            self.names, self._index = names, index
            return
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[i] for i in order]
        self._index = _Index(*(column[order] for column in index))


class Tars(_Mapped):
    """The files of one or several uncompressed .tar archives."""

    def __init__(self, path: Path, archives: Sequence[Path]) -> None:
        super().__init__(path, archives)
        names, rows = [], []
        for number, archive in enumerate(archives):
            prefix = f"{archive.name}/" if len(archives) > 1 else ""
            try:
                with tarfile.open(archive, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            names.append(prefix + member.name.removeprefix("./"))
                            rows.append((number, member.offset_data, member.size))
            except (tarfile.TarError, OSError, EOFError) as error:
                got = "a compressed archive" if _is_compressed(archive) else error
                raise InputError(
                    f"a .tar of data must be whole and uncompressed, got '{got}' in {archive}: unpack it into a folder"
                ) from error
        table = np.array(rows, np.int64).reshape(-1, 3)
        zero = np.zeros(len(rows), np.uint32)
        self._keep(names, _Index(table[:, 0], table[:, 1], table[:, 2], table[:, 2], zero, zero))

    def read(self, index: int, /) -> memoryview:
        row, name = self._index, self.names[index]
        start, length = int(row.start[index]), int(row.length[index])
        buffer = self._buffers[int(row.archive[index])]
        if length > MAX_BYTES or start + length > len(buffer):
            raise unreadable(f"{self.path}/{name}", "too large, or cut off")
        return memoryview(buffer)[start : start + length]


class Zip(_Mapped):
    """The files of a .zip, stored or deflated, read by its central directory.

    Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3. Encrypted members and archives in several parts
    are refused.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
        names, table = _central_directory(path, self._buffers[0])
        self._keep(names, _Index(np.zeros(len(names), np.int64), *table))

    def read(self, index: int, /) -> bytes | memoryview:
        row, buffer = self._index, memoryview(self._buffers[0])
        start, length, size = (int(column[index]) for column in (row.start, row.length, row.size))
        where = f"{self.path}/{self.names[index]}"
        if size > MAX_BYTES or start + 30 > len(buffer) or buffer[start : start + 4] != b"PK\3\4":
            raise unreadable(where, "too large, or cut off")
        name_length, extra_length = struct.unpack_from("<HH", buffer, start + 26)
        start += 30 + name_length + extra_length
        packed = buffer[start : start + length]
        content: bytes | memoryview = packed
        if row.method[index]:
            content = _inflated(packed, size, where)
        if len(content) != size or zlib.crc32(content) != row.crc[index]:
            raise unreadable(where, "content that does not match its checksum")
        return content


def _inflated(packed: memoryview, size: int, where: str) -> bytes:
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpack.decompress(packed, max(size, 1))
    except zlib.error as error:
        raise unreadable(where, error) from error
    if unpack.unconsumed_tail or (not unpack.eof and len(content) == size and unpack.decompress(b"", 1)):
        raise unreadable(where, "more content than it declares")
    return content


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise unreadable(path, error) from error


_END, _END64, _LOCATOR64, _CENTRAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2"
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")


def _central_directory(path: Path, buffer: mmap.mmap) -> tuple[list[str], list[np.ndarray]]:
    """Names; and start, packed length, size, method and checksum of each member that is no folder."""
    try:
        count, offset = _end_of_directory(buffer)
        rows = array("q")
        names: list[str] = []
        for _ in range(count):
            mark, flags, method, crc, length, size, n, m, k, start = _ENTRY.unpack_from(buffer, offset)
            if mark != _CENTRAL:
                raise ValueError("a damaged directory")
            offset += 46
            raw, extra = buffer[offset : offset + n], buffer[offset + n : offset + n + m] if m else b""
            offset += n + m + k
            if 0xFFFFFFFF in (length, size, start):
                size, length, start = _wide(extra, size, length, start)
            if raw.endswith(b"/"):
                continue
            if flags & 1 or method not in (0, 8):
                raise ValueError(f"{'an encrypted' if flags & 1 else 'an unusually packed'} file {raw.decode()!r}")
            rows.extend((start, length, size, method, crc))
            names.append(raw.decode("utf-8" if flags & 0x800 or raw.isascii() else "cp437"))
        if len(set(names)) < len(names):
            twice, _ = Counter(names).most_common(1)[0]
            raise ValueError(f"two files {twice!r}")
    except (struct.error, ValueError, IndexError) as error:
        reason = error if isinstance(error, ValueError) else "a damaged directory"
        raise unreadable(path, f"not a zip that can be read: {reason}") from error
    if hasattr(buffer, "madvise"):
        buffer.madvise(mmap.MADV_DONTNEED)  # the directory is not needed again: of millions of files it is large
    return names, list(np.frombuffer(rows, np.int64).reshape(-1, 5).T)


def _end_of_directory(buffer: mmap.mmap) -> tuple[int, int]:
    """How many entries the central directory has, and where it begins."""
    end = buffer.rfind(_END, max(0, len(buffer) - (1 << 16) - 22))
    if end < 0:
        raise ValueError("no directory")
    count, offset = struct.unpack_from("<10xHxxxxI", buffer, end)
    locator = end - 20
    if locator >= 0 and buffer[locator : locator + 4] == _LOCATOR64:
        (end64,) = struct.unpack_from("<8xQ", buffer, locator)
        if buffer[end64 : end64 + 4] != _END64:
            raise ValueError("no directory")
        count, offset = struct.unpack_from("<32xQ8xQ", buffer, end64)
    if count * 46 > len(buffer):
        raise ValueError("a damaged directory")
    return count, offset


def _wide(extra: bytes, size: int, length: int, start: int) -> tuple[int, int, int]:
    """Size, packed length and start, those of 32 bits that are full replaced by those of the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{n // 8}Q", extra, position + 4))
            return tuple(next(wide, v) if v == 0xFFFFFFFF else v for v in (size, length, start))  # type: ignore[return-value]
        position += 4 + n
    return size, length, start
