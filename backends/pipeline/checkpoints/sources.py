"""Stored averages to reconstruct from: finding them in a folder, opening each file once, checking that they agree.

Snapshots of edm2 say what they hold. For files of others the name gives the time, and the caller the length:

    {step}.safetensors and the like   the last number in the name is the time
    {index}.{step}.pt                 PostHocEMA of ema-pytorch (:mod:`.ema_pytorch`); index counts its sigma_rels
    ...-{kimg:07d}-{std:.3f}.pkl      official EDM2 (:mod:`.official`), which also gives the length

Time is in any unit, the same in all files.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .described import Described
from .safetensors_io import Reader, TensorFile
from .snapshots import KIND, Metadata, Snapshot, metadata_of, read_params, with_params

SUFFIXES = (".safetensors", ".pt", ".pkl")

Arrays = tuple[tuple[str, tuple[int, ...], bool], ...]  # name, shape and whether it is floating point, of each array


@dataclass(frozen=True, kw_only=True)
class Source:
    """A stored average in an open file. ``time`` and a half-life are in the same unit."""

    path: Path
    metadata: Metadata
    length: Length
    reader: Reader

    @property
    def time(self) -> int:
        return self.metadata.nimg

    @property
    def config(self) -> NetworkConfig | None:
        return self.metadata.config

    def load(self) -> Snapshot:
        """The whole average. Raises InputError where the file has been damaged since it was opened."""
        metadata = replace(self.metadata, length=self.length)
        return with_params(metadata, read_params(self.reader, metadata.kept))


class Broken(InputError):
    """The file at ``path`` cannot be used."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message if str(path) in message else f"{path}: {message}")
        self.path = path


Skip = Callable[[Broken], None]


def open_sources(
    source: str | Path | Iterable[str | Path], /, *, described: Described | None = None, skip: Skip | None = None
) -> list[Source]:
    """Open the averages in a run folder, in any folder of files, or at these paths; in order of time, then of length.

    All must hold the same arrays of one network: files that differ from the majority are broken. ``described`` gives
    the lengths of files without metadata. ``skip`` is called with each broken file, which is left out; without it they
    raise.

    Raises:
        InputError: nothing there, or a broken file: damaged, foreign, of other arrays or of another network.
    """
    paths = _paths(source)
    sources = []
    for path in paths:
        try:
            sources.append(_open(path, described or Described()))
        except Broken as error:
            if skip is None:
                raise
            skip(error)
    sources = _agreeing(sources, skip)
    if not sources:
        raise InputError(
            f"averages to reconstruct from must be one or more sound files, got none of {len(paths)}: copy them again"
        )
    return sorted(sources, key=lambda source: (source.time, source.length, str(source.path)))


def _paths(source: str | Path | Iterable[str | Path]) -> list[Path]:
    if not isinstance(source, str | Path):
        return [Path(path) for path in source]
    folder = Path(source)
    folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    for suffix in SUFFIXES:
        if paths := sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")):
            return paths
    raise InputError(f"a folder must hold snapshots, got none in {folder}: choose a run that has some, or train longer")


def _open(path: Path, described: Described) -> Source:
    try:
        index, metadata, reader = _read(path)
    except InputError as error:
        raise Broken(path, str(error)) from error
    length = metadata.length or described.length(path, index)
    return Source(path=path, metadata=metadata, length=length, reader=reader)


def _read(path: Path) -> tuple[int, Metadata, Reader]:
    """The index in the name of a file (0 where there is none), its metadata, and the open file."""
    if path.suffix == ".pt":
        from .ema_pytorch import PostHocFile, index_and_step

        index, step = index_and_step(path)
        return index, Metadata(config=None, nimg=step, length=None), PostHocFile(path)
    if path.suffix == ".pkl":
        from .official import open_official

        return 0, *open_official(path)
    file = TensorFile(path)
    if file.metadata.get("format") == KIND:
        return 0, metadata_of(file), file
    return 0, Metadata(config=None, nimg=_step(path), length=None), file


def _step(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    if not numbers or not int(numbers[-1]):
        raise InputError(f"{path} must have its time in its name, such as model-2000.safetensors, got none: rename it")
    return int(numbers[-1])


def _agreeing(sources: Sequence[Source], skip: Skip | None) -> list[Source]:
    """The sources that have the config and the arrays of the majority."""
    kinds = [(source.config, _arrays(source)) for source in sources]
    usual = Counter(kinds).most_common(1)[0][0] if kinds else None
    agreeing = []
    for source, kind in zip(sources, kinds, strict=True):
        if usual is None or kind == usual:
            agreeing.append(source)
            continue
        difference = _difference(kind[1], usual[1]) or ("another config" if kind[0] != usual[0] else "other dtypes")
        what = f"an average of the same network as most, got {difference}"
        broken = Broken(source.path, f"{source.path} must be {what}: leave it out")
        if skip is None:
            raise broken
        skip(broken)
    return agreeing


def _arrays(source: Source) -> Arrays:
    return tuple((name, entry.shape, entry.floating) for name, entry in sorted(source.reader.entries.items()))


def _difference(one: Arrays, usual: Arrays) -> str | None:
    """The first array that is missing, additional, or of another shape."""
    arrays, wanted = ({name: shape for name, shape, _ in table} for table in (one, usual))
    for name in sorted({*arrays, *wanted}):
        if name not in arrays:
            return f"no {name}"
        if name not in wanted:
            return f"{name} besides"
        if arrays[name] != wanted[name]:
            return f"{name} of shape {arrays[name]} instead of {wanted[name]}"
    return None
