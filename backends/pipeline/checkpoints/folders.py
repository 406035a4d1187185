"""Finding files of weights in a folder, or in the folders of checkpoints in it; weights in several files."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edm2_core.errors import InputError

from .file_times import pattern_regex
from .safetensors_io import Entry, TensorFile

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth", ".ckpt", ".bin")
_NOT_WEIGHTS = (
    "training-state",
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    ".",
)
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class FoundFile:
    """Stored weights: the name that may tell their time, and their file, or the folder of their files."""

    name: str
    path: Path


def find_files(folder: Path, pattern: str | None, /) -> list[FoundFile]:
    """The weights in a run, in any folder, or in the folders of checkpoints in it, of which ``pattern`` selects some.

    Raises:
        InputError: none, files of several kinds, or checkpoints with several weights of which none is selected.
    """
    folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    if files := _weights_in(folder):
        kinds = Counter(path.suffix for path in files)
        if len(kinds) > 1:
            seen = " and ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
            raise InputError(f"files of a folder must be of one kind, got {seen} in {folder}: move the others away")
        return [FoundFile(path.stem, path) for path in files]
    if checkpoints := [found for inner in _folders_in(folder) for found in _checkpoint(folder, inner)]:
        return _selected(checkpoints, pattern)
    seen = ", ".join(sorted(path.name for path in folder.glob("*"))[:5]) or "nothing"
    raise InputError(f"a folder must hold snapshots ({', '.join(SUFFIXES)}), got {seen} in {folder}: check the path")


def _weights_in(folder: Path) -> list[Path]:
    files = (path for path in folder.glob("*") if path.suffix in SUFFIXES and not path.name.startswith(_NOT_WEIGHTS))
    return sorted(path for path in files if path.is_file())


def _folders_in(folder: Path) -> list[Path]:
    """The folders in ``folder``, and those in them."""
    outer = sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))
    return [path for one in outer for path in (one, *sorted(inner for inner in one.glob("*") if inner.is_dir()))]


def _checkpoint(folder: Path, inner: Path) -> list[FoundFile]:
    """The weights in a folder of a checkpoint, under the folder's name; safetensors if there are others too."""
    name = inner.relative_to(folder).as_posix()
    if list(inner.glob(f"*{_INDEX}")):
        return [FoundFile(name, inner)]
    files = _weights_in(inner)
    best = [path for path in files if path.suffix == ".safetensors"] or files
    if len(best) > 1:
        raise InputError(f"a checkpoint must hold one file of weights, got {best[0].name}, {best[1].name} in {inner}")
    return [FoundFile(name, path) for path in best]


def _selected(checkpoints: list[FoundFile], pattern: str | None) -> list[FoundFile]:
    if pattern is not None:
        if chosen := [found for found in checkpoints if pattern_regex(pattern).fullmatch(found.name)]:
            return chosen
        raise InputError(f"--pattern must match a folder with weights, got {pattern}: one is {checkpoints[0].name}")
    kinds = sorted({found.name.partition("/")[2] for found in checkpoints})
    if len(kinds) > 1:
        ways = " or ".join(f"'checkpoint-{{time}}{'/' * bool(kind)}{kind}'" for kind in kinds)
        raise InputError(f"checkpoints must hold one network each, got {len(kinds)}: choose one with --pattern {ways}")
    return checkpoints


class ShardedFile:
    """Arrays in several safetensors files of one folder, by its index; a :class:`~.safetensors_io.Reader`.

    Raises:
        InputError: a damaged index or file, or an array that is not where the index says.
    """

    def __init__(self, folder: Path) -> None:
        index = next(iter(sorted(folder.glob(f"*{_INDEX}"))))
        try:
            places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            files = {name: TensorFile(folder / Path(name).name) for name in set(places.values())}
            self._files = {name: files[place] for name, place in places.items()}
            self.entries: dict[str, Entry] = {name: file.entries[name] for name, file in self._files.items()}
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{index} must name the file of each array, got a fault, {error}: copy it again"
            ) from error

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        """See :meth:`~.safetensors_io.FileReader.fill`."""
        self._files[name].fill(out, name, start)
