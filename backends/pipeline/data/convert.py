"""Pictures of any kind made into a training set: a .zip or a folder in the official layout.

Work is done in chunks, each stored when it is finished in a folder beside the output, so a conversion that was stopped
goes on where it was. The output has the same bytes whatever the number of workers, and appears whole.
"""

import hashlib
import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from PIL import UnidentifiedImageError

from backends.pipeline.checkpoints.atomic import write_atomically, write_bytes
from edm2_core.errors import InputError

from .file_labels import MANIFEST, Labels, manifest, read_labels
from .files import Files, Zip, is_hidden, open_files
from .images import SUFFIXES, UNREADABLE
from .tables import is_table, open_table
from .transforms import Settings, transformed
from .workers import process_pool

CHUNK = 256
RECORD = "edm2-convert-settings"
_NAMED = 10


@dataclass(frozen=True)
class Fault:
    """A picture that could not be converted, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Converted:
    """How many pictures were written, and those that were not."""

    count: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Source:
    """Pictures in files or rows of a table, in the order in which they are converted, and their labels."""

    files: Files
    indices: Sequence[int]
    labels: Labels | None

    def digest(self, settings: Settings) -> str:
        """A short name of all that the chunks depend on."""
        text = json.dumps([CHUNK, asdict(settings), str(self.files.path), [self.files.names[i] for i in self.indices]])
        return hashlib.sha256(text.encode()).hexdigest()

    def version(self, span: range) -> str:
        """A short text that changes with the files of ``span``: a picture that was mended is converted again."""
        stored = [_stored(self.files, self.indices[number]) for number in span]
        seen = [(file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in stored]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _stored(files: Files, index: int) -> os.stat_result:
    """Of a file in a folder, or of the archive or table that holds it."""
    try:
        return (files.path / files.names[index]).stat()
    except (OSError, ValueError):  # ValueError: a name in an archive that no file can have
        return files.path.stat()


def open_source(path: Path, /, *, max_images: int | None = None) -> Source:
    """The pictures under ``path``, of any size, the first ``max_images`` by name.

    Raises:
        InputError: nothing there, no pictures, none wanted, or labels that do not fit.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"--max-images must be at least 1, got {max_images}: leave it out to convert all")
    if not path.exists():
        raise InputError(f"a source must exist, got {path}: check the path")
    if is_table(path):
        rows, labels = open_table(path)
        return Source(rows, range(len(rows.names))[:max_images], labels)
    files = open_files(path)
    indices = [i for i, name in enumerate(files.names) if name.lower().endswith(SUFFIXES) and not is_hidden(name)]
    if not indices:
        raise InputError(f"a source must hold pictures ({' '.join(SUFFIXES)}), got none in {path}: check the path")
    labels = read_labels(files, indices)
    return Source(files, indices[:max_images], labels)


def convert(
    source: Source,
    dest: Path,
    settings: Settings,
    /,
    *,
    workers: int = 1,
    skip_broken: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Converted:
    """Write the pictures of ``source`` to ``dest``, a .zip or a folder.

    ``progress`` is told how many pictures were done. With ``workers`` above 1, that many processes decode.

    Raises:
        InputError: ``dest`` exists, or a folder of that name with .partial that no conversion made; ``workers`` below
            1; pictures that are broken, or of another size without a transform, all named at once, unless
            ``skip_broken``; or no picture is left.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}: 1 converts in this process")
    if dest.exists():
        raise InputError(f"the output must be new, got {dest}, which exists: choose another name, or remove it")
    partial = dest.with_name(f"{dest.name}.partial")
    _claim(partial, source.digest(settings))
    everything = range(len(source.indices))
    spans = [everything[start : start + CHUNK] for start in everything[::CHUNK]]
    paths = [partial / f"{span.start:08d}-{source.version(span)}.zip" for span in spans]
    with _pool(source, settings, workers) as submit:
        _in_order(spans, paths, submit, progress, ahead=2 * workers)
    size = settings.size or _first_size(paths)
    faults = tuple(fault for path in paths for fault in _faults(Zip(path), source, settings, size))
    if len(faults) == len(source.indices) or (faults and not skip_broken):
        raise _broken(faults, len(source.indices), skip_broken=skip_broken)
    count = _assemble(paths, dest, source, None if settings.size else size)
    shutil.rmtree(partial)
    return Converted(count, faults)


def _claim(partial: Path, digest: str) -> None:
    """Make the folder of chunks; those of other settings are removed, anything else is left alone."""
    record = partial / RECORD
    if partial.is_dir() and record.is_file():
        if record.read_text() == digest:
            return
        shutil.rmtree(partial)
    elif partial.exists() and not _is_just_begun(partial):
        raise InputError(
            f"unfinished work goes to {partial}, which must be new, got something that no conversion made: rename it, "
            "or choose another output"
        )
    write_bytes(record, digest.encode())


def _is_just_begun(partial: Path) -> bool:
    """Whether a conversion was killed before it had stored its settings."""
    return partial.is_dir() and all(path.name.startswith(f".{RECORD}.") for path in partial.iterdir())


Submit = Callable[[range, Path], "Future[int]"]


def _in_order(
    spans: Sequence[range], paths: Sequence[Path], submit: Submit, progress: Callable[[int], None], *, ahead: int
) -> None:
    """Make the chunks that are missing, ``ahead`` of them at a time."""
    running: deque[Future[int]] = deque()
    for span, path in zip(spans, paths, strict=True):
        if path.exists():
            progress(len(span))
            continue
        if len(running) >= ahead:
            progress(running.popleft().result())
        running.append(submit(span, path))
    for future in running:
        progress(future.result())


@contextmanager
def _pool(source: Source, settings: Settings, workers: int) -> Iterator[Submit]:
    """A function that makes a chunk, in one of ``workers`` processes, or at once in this one."""
    if workers <= 1:

        def at_once(span: range, path: Path) -> Future[int]:
            future: Future[int] = Future()
            future.set_result(_make_chunk(source, settings, span, path))
            return future

        yield at_once
        return
    with process_pool(workers, _keep, source, settings) as pool:
        try:
            yield lambda span, path: pool.submit(_in_process, span, path)
        finally:
            pool.shutdown(cancel_futures=True)


def _keep(source: Source, settings: Settings) -> None:
    global _job
    _job = source, settings


def _in_process(span: range, path: Path) -> int:
    return _make_chunk(*_job, span, path)


_job: tuple[Source, Settings]


def _make_chunk(source: Source, settings: Settings, span: range, path: Path) -> int:
    """Write a .zip of the PNG of each picture, called by its number; of a fault, the reason. Returns how many."""

    def write(file: BinaryIO) -> None:
        with ZipFile(file, "w") as chunk:
            for number in span:
                index = source.indices[number]
                try:
                    chunk.writestr(f"{number:08d}.png", transformed(source.files.read(index), settings))
                except UNREADABLE as error:
                    chunk.writestr(f"{number:08d}.fault", _reason(error))

    write_atomically(path, write)
    return len(span)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message shows a Python object
        return "is not an image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


def _faults(chunk: Zip, source: Source, settings: Settings, size: tuple[int, int] | None) -> Iterator[Fault]:
    for index, name in enumerate(chunk.names):
        where = f"{source.files.path}/{source.files.names[source.indices[int(name[:8])]]}"
        if name.endswith(".fault"):
            yield Fault(where, bytes(chunk.read(index)).decode())
        elif settings.size is None and (found := _png_size(chunk.read(index))) != size:
            of_first = "" if size is None else f", not {size[0]}x{size[1]} as the first"
            yield Fault(where, f"is {found[0]}x{found[1]}{of_first}: name a --resolution and a --transform")


def _first_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Width and height of the first picture that is not broken."""
    whole = ((c, i) for c in map(Zip, paths) for i, name in enumerate(c.names) if name.endswith(".png"))
    first = next(whole, None)
    return None if first is None else _png_size(first[0].read(first[1]))


def _png_size(content: bytes | memoryview) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", content, 16)  # the header comes first
    return width, height


def _broken(faults: Sequence[Fault], count: int, *, skip_broken: bool) -> InputError:
    named = "; ".join(f"{fault.name} {fault.reason}" for fault in faults[:_NAMED])
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return InputError(
        f"pictures must be whole and of the wanted size, got {len(faults)} of {count} that are not: {named}{more}: "
        + ("mend them, for nothing else is left" if skip_broken else "mend them, or leave them out with --skip-broken")
    )


def _assemble(paths: Sequence[Path], dest: Path, source: Source, size: tuple[int, int] | None) -> int:
    """The output of all chunks, of which one is in memory at a time; pictures of another ``size``, where one is given,
    are left out. Returns how many."""
    labels: list[list[object]] = []

    def pictures() -> Iterator[tuple[str, bytes | memoryview]]:
        for chunk in map(Zip, paths):
            for index, name in enumerate(chunk.names):
                if not name.endswith(".png"):
                    continue
                content = chunk.read(index)
                if size is None or _png_size(content) == size:
                    official = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                    labels.append([official, _label(source.labels, int(name[:8]))])
                    yield official, content

    given = source.labels
    text = (None, ()) if given is None else (labels, given.classes)
    write_set(dest, pictures(), lambda: {MANIFEST: manifest(*text)})
    return len(labels)


def _label(labels: Labels | None, number: int) -> object:
    return None if labels is None else labels.values[number].tolist()


def write_set(
    dest: Path, samples: Iterator[tuple[str, bytes | memoryview]], manifests: Callable[[], dict[str, bytes]]
) -> None:
    """Write named files, and the ``manifests`` that are known after them, to an uncompressed .zip or to a folder, whole
    or not at all."""
    if dest.suffix.lower() == ".zip":

        def write(file: BinaryIO) -> None:
            with ZipFile(file, "w", ZIP_STORED) as out:
                for name, content in samples:
                    out.writestr(ZipInfo(name), bytes(content))
                for name, content in manifests().items():
                    out.writestr(ZipInfo(name), content)

        write_atomically(dest, write)
        return
    made = dest.with_name(f".{dest.name}.tmp")
    shutil.rmtree(made, ignore_errors=True)
    for name, content in samples:
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name, content in manifests().items():
        write_bytes(made / name, content)
    made.rename(dest)
