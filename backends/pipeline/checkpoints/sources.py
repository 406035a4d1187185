"""Stored averages to reconstruct from: finding them in a folder, opening each file once, checking that they agree.

Snapshots of edm2 say what they hold. For files of others their metadata or their names give the time, and the caller
the length:

    {index}.{step}.pt                   PostHocEMA of ema-pytorch (:mod:`.torch_files`); index counts its sigma_rels
    ...-{kimg:07d}-{std:.3f}.pkl        official EDM2 (:mod:`.official`), which also gives the length
    *.safetensors, *.ckpt, *.pt         LoRA tools (``ss_steps`` in the metadata), Lightning (``global_step``), others;
                                        without a time inside, by one pattern in their names (:mod:`.file_times`)
    checkpoint-{step}/...               folders of Hugging Face trainers, also with several files each

Time is in any unit, the same in all files.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .described import Described
from .file_times import TIME, named_times, some
from .folders import INDEX, FoundFile, ShardedFile, find_files
from .remote import local
from .safetensors_io import Reader, TensorFile
from .snapshots import KIND, Metadata, Snapshot, metadata_of, read_params, with_params
from .torch_files import Unreachable

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
_LOGGER = logging.getLogger("edm2")


def open_sources(
    source: str | Path | Iterable[str | Path],
    /,
    *,
    described: Described | None = None,
    skip: Skip | None = None,
    show: Callable[[str], None] = _LOGGER.info,
) -> list[Source]:
    """Open the averages in a run folder, in any folder of files, at a URL of either, or at these paths; in order of
    time, then of length.

    All must hold the same arrays of one network: files that differ from the majority are broken. ``described`` tells
    what files without metadata hold. ``skip`` is called with each broken file, which is left out; without it they
    raise. ``show`` gets a line for the pattern that times are read by, and for each file that is left out because
    nothing can be made of it.

    Raises:
        InputError: nothing there; times that are unknown, or the same in averages of one length; or a broken file:
            damaged, foreign, of other arrays or of another network.
    """
    described = described or Described()
    if isinstance(source, str | Path):
        files = find_files(local(source), described.pattern)
    else:
        files = [FoundFile(Path(path).stem, Path(path)) for path in source]
    opened: list[_Opened] = []
    for file in files:
        try:
            opened.append(_open(file))
        except InputError as error:
            broken = Broken(file.path, str(error))
            if skip is None:
                raise broken from error
            skip(broken)
    times = _times(opened, described, show) if opened else {}
    sources, left_out = [], dict[str, list[str]]()
    for one in opened:
        try:
            length = one.metadata.length or described.length(one.path, one.index)
            if not times[one.path]:
                raise Unreachable("time 0 is before training, when nothing has been averaged")
        except Unreachable as error:
            shown = one.path.name if one.path.stem == one.name else one.name
            left_out.setdefault(str(error), []).append(shown)
            continue
        metadata = replace(one.metadata, nimg=times[one.path])
        sources.append(Source(path=one.path, metadata=metadata, length=length, reader=one.reader))
    sources = _agreeing(sources, skip)
    _check_different(sources)
    if not sources:
        why = next(iter(left_out), "copy them again")
        raise InputError(
            f"averages to reconstruct from must be one or more usable files, got none of {len(files)}: {why}"
        )
    for why, names in left_out.items():
        show(f"left out  {', '.join(names)}: {why}")
    return sorted(sources, key=lambda source: (source.time, source.length, str(source.path)))


@dataclass(frozen=True)
class _Opened:
    """An open file: its name, the index of its average (0 where there is one), and what it records, perhaps no time."""

    path: Path
    name: str
    index: int
    time: int | None
    metadata: Metadata
    reader: Reader


def _times(opened: Sequence[_Opened], described: Described, show: Callable[[str], None]) -> dict[Path, int]:
    """The time of each file: as the files record it, or by their names, but never in part by each, whose units may
    differ. A pattern that says where the time is comes before what is recorded."""
    recorded = {one.path: one.time for one in opened if one.time is not None}
    unknown = {one.path: one.name for one in opened if one.time is None}
    pattern, last = described.pattern, described.last_time
    if not recorded or TIME in (pattern or ""):
        named = named_times([one.name for one in opened], pattern=pattern, last_time=last)
        show(str(named))
        return {one.path: named.times[one.name] for one in opened}
    if not unknown and last is not None:
        raise InputError(f"--last-time is for a file without a time, got {len(recorded)} that record theirs: omit it")
    if len(unknown) > 1 or (unknown and last is None):
        span = f"{min(recorded.values())} to {max(recorded.values())}"
        raise InputError(
            f"files must all record their time, got {some([*unknown.values()])} beside {len(recorded)}, from {span}: "
            f"give {'--last-time if it is the last, or ' * (len(unknown) == 1)}--pattern to take all times from names"
        )
    return recorded | {path: last for path in unknown if last is not None}


def _check_different(sources: Sequence[Source]) -> None:
    same: dict[tuple[int, Length], list[str]] = {}
    for source in sources:
        same.setdefault((source.time, source.length), []).append(str(source.path))
    for (time, _), names in same.items():
        if len(names) > 1:
            raise InputError(
                f"times must differ, got {time} in {some(names)}: move one away, or give --pattern for other times"
            )


def _open(file: FoundFile) -> _Opened:
    return _Opened(file.path, file.name, *_read(file.path))


def _read(path: Path) -> tuple[int, int | None, Metadata, Reader]:
    """Index, time, metadata and arrays."""
    if path.name.endswith(INDEX):
        return 0, None, _foreign(), ShardedFile(path)
    if path.suffix == ".pkl":
        from .official import open_official

        metadata, pickled = open_official(path)
        return 0, metadata.nimg, metadata, pickled
    if path.suffix != ".safetensors":
        from .torch_files import TorchFile, index_and_step

        weights = TorchFile(path)
        index, time = index_and_step(path) if weights.posthoc else (0, weights.time)
        return index, time, _foreign(), weights
    file = TensorFile(path)
    if file.metadata.get("format") == KIND:
        metadata = metadata_of(file)
        return 0, metadata.nimg, metadata, file
    others = {key: text for key, text in file.metadata.items() if key.startswith("ss_")}  # of LoRA tools
    steps = others.get("ss_steps", "")
    return 0, int(steps) if steps.isdecimal() else None, _foreign(others), file


def _foreign(others: Mapping[str, str] | None = None) -> Metadata:
    return Metadata(config=None, nimg=0, length=None, others=others or {})


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
