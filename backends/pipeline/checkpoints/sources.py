"""Which averages lie in a folder, of what time and length, in whose format, and how are parts of them read?

Ours are read from their metadata. Of others' files the name gives the time, and the caller says what was averaged:

    {step}.safetensors and the like   the last number in the name is the time
    {index}.{step}.pt                 ema-pytorch's PostHocEMA; index is that of its sigma_rels
    ...-{kimg:07d}-{std:.3f}.pkl      official EDM2, turned into snapshots of ours first

Time is in any unit, the same in all files.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, Protocol
from weakref import finalize

import numpy as np

from edm2_core.ema import HalfLife, gamma_to_sigma_rel, half_life_of_raw, sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, check_parameters

from .safetensors_io import Entry, TensorFile
from .snapshots import KIND, metadata_of, save_snapshot

KINDS = (".safetensors", ".pt", ".pkl")


class Reader(Protocol):
    """Arrays by name, of which parts can be read from any thread; see :class:`TensorFile`."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def fill(self, room: np.ndarray, name: str, start: int, /) -> None:
        """As :meth:`TensorFile.fill`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A stored average; one of ``sigma_rel`` nan is a traditional one, of ``half_life`` in the unit of ``time``."""

    path: Path
    time: int
    sigma_rel: float
    half_life: float = nan
    config: NetworkConfig | None = None
    reader: Reader

    @property
    def order(self) -> tuple[int, float, str]:
        return self.time, 0.0 if isnan(self.sigma_rel) else self.sigma_rel, str(self.path)


@dataclass(frozen=True, kw_only=True)
class Described:
    """What files are that do not say so themselves; at most one of the first three.

    ``sigma_rels``: lengths, one for all files or one per index in their names. ``half_life``: of a traditional average,
    in the unit of time. ``raw_step``: no averages but the weights, which held for one step of this long.
    ``update_every``: the tracker moved its averages every so many steps as if it were every step, as ema-pytorch does.
    """

    sigma_rels: tuple[float, ...] = ()
    half_life: float | None = None
    raw_step: float | None = None
    update_every: int = 1

    def __post_init__(self) -> None:
        if sum(map(bool, (self.sigma_rels, self.half_life, self.raw_step))) > 1:
            raise InputError(
                "files hold averages of known lengths, traditional ones, or raw weights, got several: say one"
            )
        for name in ("half_life", "raw_step"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"{name} must be positive, got {value:g}: it is a time")
        if self.update_every < 1:
            raise InputError(f"update_every must be at least 1, got {self.update_every}: 1 is every step")
        for sigma_rel in self.sigma_rels:
            sigma_rel_to_gamma(sigma_rel)

    def length(self, path: Path, index: int) -> dict[str, float]:
        """``sigma_rel`` and ``half_life`` of a file."""
        if self.raw_step is not None or self.half_life is not None:
            life = half_life_of_raw(self.raw_step) if self.raw_step is not None else self.half_life
            return {"sigma_rel": nan, "half_life": life or nan}
        if not self.sigma_rels:
            raise InputError(
                f"{path} does not say what was averaged: add --source-sigma-rels, --source-half-life or --source-raw"
            )
        if len(self.sigma_rels) > 1 and index >= len(self.sigma_rels):
            raise InputError(f"{path} has index {index}, got {len(self.sigma_rels)} lengths: give one for each index")
        return {"sigma_rel": self._kept(self.sigma_rels[min(index, len(self.sigma_rels) - 1)], path)}

    def _kept(self, sigma_rel: float, path: Path) -> float:
        """The length of what was really tracked: every k-th update with a one-step beta leaves t^-((gamma + 1) / k)."""
        if self.update_every == 1:
            return sigma_rel
        gamma = (sigma_rel_to_gamma(sigma_rel) + 1) / self.update_every - 1
        if gamma < 0:
            raise InputError(
                f"{path}: lengths must be within (0, 0.2887), got more: {sigma_rel:g} updated every "
                f"{self.update_every} steps as if it were every step averages nearly all of training, and nothing "
                "shorter can be made of it"
            )
        return float(gamma_to_sigma_rel(gamma))


class Broken(InputError):
    """A file that cannot take part. ``path`` names it."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


def open_sources(
    source: str | Path | Iterable[str | Path],
    /,
    *,
    described: Described | None = None,
    skip: Callable[[Broken], None] | None = None,
) -> list[Source]:
    """The averages in a run folder, in any folder of files, or at these paths; in order of time, then of length.

    All hold the same arrays, of one network. What does not fit most of the others is broken. ``skip`` is told of broken
    files, which are left out; without it they raise.

    Raises:
        InputError: nothing there, or a broken file: damaged, foreign, of other arrays or of another network.
    """
    paths = _paths(source)
    found = []
    for path in paths:
        try:
            found.append(_open(path, described or Described()))
        except InputError as error:
            if skip is None or not isinstance(error, Broken):
                raise
            skip(error)
    found = _alike(found, skip)
    if not found:
        raise InputError(
            f"averages to reconstruct from must be one or more sound files, got none of {len(paths)}: copy them again"
        )
    return sorted(found, key=lambda source: source.order)


def _paths(source: str | Path | Iterable[str | Path]) -> list[Path]:
    if not isinstance(source, str | Path):
        if not (paths := [Path(path) for path in source]):
            raise InputError("snapshots to reconstruct from must be one or more, got none: give their paths")
        return paths
    folder = Path(source)
    folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    for suffix in KINDS:
        if paths := sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")):
            return paths
    raise InputError(f"a folder must hold snapshots, got none in {folder}: choose a run that has some, or train longer")


def _open(path: Path, described: Described) -> Source:
    try:
        if path.suffix == ".pt":
            index, time = _index_and_step(path)
            reader: Reader = _TorchFile(path)
            sigma_rel, config = None, None
        else:
            reader = _imported(path) if path.suffix == ".pkl" else TensorFile(path)
            index, time, sigma_rel, config = 0, *_time_length_config(reader)
    except InputError as error:
        raise Broken(path, str(error) if str(path) in str(error) else f"{path}: {error}") from error
    length = described.length(path, index) if sigma_rel is None else _known(sigma_rel)
    return Source(path=path, time=time, config=config, reader=reader, **length)


def _known(length: float) -> dict[str, float]:
    return {"sigma_rel": nan, "half_life": float(length)} if isinstance(length, HalfLife) else {"sigma_rel": length}


def _time_length_config(file: TensorFile) -> tuple[int, float | None, NetworkConfig | None]:
    if file.metadata.get("format") != KIND:
        return _step(file.path), None, None
    metadata = metadata_of(file)
    if metadata.config is not None:
        check_parameters(metadata.config, file.entries)
    return metadata.nimg, metadata.sigma_rel, metadata.config


def _step(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    if not numbers or not int(numbers[-1]):
        raise InputError(f"{path} must have its time in its name, such as model-2000.safetensors, got none: rename it")
    return int(numbers[-1])


def _imported(path: Path) -> TensorFile:
    """An official pickle as a snapshot of ours, in a file that lasts as long as this object."""
    from .official import read_official

    snapshot = read_official(path)
    folder = Path(mkdtemp(prefix="edm2-"))
    try:
        save_snapshot(folder / f"{path.stem}.safetensors", snapshot)
        file = TensorFile(folder / f"{path.stem}.safetensors")
    except BaseException:
        rmtree(folder)
        raise
    finalize(file, rmtree, folder)
    return file


class _TorchFile:
    """An EMA in a file of ema-pytorch's, opened with weights only, mapped and not loaded."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            prefix = "ema_model."
            self._tensors = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
            self._bits = torch.uint16
            codes |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
            self.entries = {n: Entry(codes[t.dtype], tuple(t.shape), 0) for n, t in self._tensors.items()}
        except Exception as error:  # whatever torch finds wrong with it
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{path} must be a state of PostHocEMA, got '{why:.120}': copy it again") from error
        if not self.entries:
            raise InputError(f"{path} must be a state of PostHocEMA, got no ema_model in it: choose its folder")

    def fill(self, room: np.ndarray, name: str, start: int, /) -> None:
        part = self._tensors[name].reshape(-1)[start : start + room.size]
        room[:] = part.view(self._bits).numpy() if self.entries[name].dtype == "BF16" else part.numpy()


def _index_and_step(path: Path) -> tuple[int, int]:
    named = re.fullmatch(r"(\d+)\.(\d+)", path.stem)
    if not named or not int(named[2]):
        raise InputError(f"{path} must be named as PostHocEMA names its files, 0.1000.pt, got another: rename it")
    return int(named[1]), int(named[2])


def _alike(found: Sequence[Source], skip: Callable[[Broken], None] | None) -> list[Source]:
    """Those whose network and arrays are those of most."""
    tables = [
        tuple((name, entry.shape, entry.floating) for name, entry in sorted(s.reader.entries.items())) for s in found
    ]
    kinds = [(source.config, table) for source, table in zip(found, tables, strict=True)]
    if len(set(kinds)) <= 1:
        return list(found)
    usual = Counter(kinds).most_common(1)[0][0]
    kept = []
    for source, kind in zip(found, kinds, strict=True):
        if kind == usual:
            kept.append(source)
            continue
        what = f"an average of the same network as most, got {_difference(kind, usual)}"
        broken = Broken(source.path, f"{source.path} must be {what}: leave it out")
        if skip is None:
            raise broken
        skip(broken)
    return kept


def _difference(kind: tuple[Any, ...], usual: tuple[Any, ...]) -> str:
    arrays, wanted = ({name: shape for name, shape, _ in table} for table in (kind[1], usual[1]))
    for name in sorted({*arrays, *wanted}):
        if name not in arrays:
            return f"no {name}"
        if name not in wanted:
            return f"{name} besides"
        if arrays[name] != wanted[name]:
            return f"{name} of shape {arrays[name]} instead of {wanted[name]}"
    return "another config" if kind[0] != usual[0] else "other dtypes"
