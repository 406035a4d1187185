"""Pictures of any kind made into a training set: a .zip or a folder in the official layout.

Work is done in chunks, each stored when it is finished in a folder beside the output, so a conversion that was stopped
goes on where it was. The output has the same bytes whatever the number of workers, and appears whole.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from backends.pipeline.checkpoints.atomic import write_atomically, write_bytes
from edm2_core.errors import InputError

from .file_labels import MANIFEST, Labels, read_labels
from .files import Files, Zip, is_hidden, open_files
from .images import SUFFIXES, UNREADABLE
from .tables import is_table, open_table
from .transforms import Settings, transformed
from .workers import process_pool

CHUNK = 256
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


def open_source(path: Path, /, *, max_images: int | None = None) -> Source:
    """The pictures under ``path``, of any size, the first ``max_images`` by name.

    Raises:
        InputError: nothing there, no pictures, or labels that do not fit.
    """
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
        InputError: ``dest`` exists; or pictures that are broken, or of another size without a transform, all named at
            once, unless ``skip_broken``.
    """
    if dest.exists():
        raise InputError(f"the output must be new, got {dest}, which exists: choose another name, or remove it")
    partial = dest.with_name(f"{dest.name}.partial")
    _claim(partial, source.digest(settings))
    everything = range(len(source.indices))
    spans = [everything[start : start + CHUNK] for start in everything[::CHUNK]]
    with _pool(source, settings, workers) as submit:
        _in_order(spans, partial, submit, progress, ahead=2 * workers)
    chunks = [Zip(_chunk(partial, span)) for span in spans]
    faults = tuple(fault for chunk in chunks for fault in _faults(chunk))
    if faults and not skip_broken:
        raise _broken(faults, len(source.indices))
    count = _assemble(chunks, dest, source)
    shutil.rmtree(partial)
    return Converted(count, faults)


def _claim(partial: Path, digest: str) -> None:
    """Make the folder of chunks; those of other settings are removed."""
    record = partial / "settings"
    if partial.exists() and (not record.exists() or record.read_text() != digest):
        shutil.rmtree(partial)
    write_bytes(record, digest.encode())


def _chunk(partial: Path, span: range) -> Path:
    return partial / f"{span.start:08d}.zip"


Submit = Callable[[range, Path], "Future[int]"]


def _in_order(
    spans: Sequence[range], partial: Path, submit: Submit, progress: Callable[[int], None], *, ahead: int
) -> None:
    """Make the chunks that are missing, ``ahead`` of them at a time."""
    running: deque[Future[int]] = deque()
    for span in spans:
        path = _chunk(partial, span)
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
                    reason = " ".join(str(error).split()) or type(error).__name__
                    fault = Fault(f"{source.files.path}/{source.files.names[index]}", reason)
                    chunk.writestr(f"{number:08d}.fault", json.dumps(asdict(fault)))

    write_atomically(path, write)
    return len(span)


def _faults(chunk: Zip) -> Iterator[Fault]:
    for index, name in enumerate(chunk.names):
        if name.endswith(".fault"):
            yield Fault(**json.loads(bytes(chunk.read(index))))


def _broken(faults: Sequence[Fault], count: int) -> InputError:
    named = "; ".join(f"{fault.name} {fault.reason}" for fault in faults[:_NAMED])
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return InputError(
        f"pictures must be whole and of the wanted size, got {len(faults)} of {count} that are not: {named}{more}: "
        "mend them, or leave them out with --skip-broken"
    )


def _assemble(chunks: Sequence[Zip], dest: Path, source: Source) -> int:
    """The output of all chunks. Returns the number of pictures."""
    labels: list[list[object]] = []

    def pictures() -> Iterator[tuple[str, bytes | memoryview]]:
        for chunk in chunks:
            for index, name in enumerate(chunk.names):
                if name.endswith(".png"):
                    official = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                    labels.append([official, _label(source.labels, int(name[:8]))])
                    yield official, chunk.read(index)

    write_set(dest, pictures(), lambda: {MANIFEST: _manifest(labels, source.labels)})
    return len(labels)


def _label(labels: Labels | None, number: int) -> object:
    return None if labels is None else labels.values[number].tolist()


def _manifest(labels: Sequence[Sequence[object]], given: Labels | None) -> bytes:
    content: dict[str, object] = {"labels": None if given is None else list(labels)}
    if given is not None and given.classes:
        content["classes"] = list(given.classes)
    return json.dumps(content).encode()


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
