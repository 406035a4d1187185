"""Finding files of weights in a folder, or in the folders of checkpoints in it; weights in several files."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .file_times import TIME, pattern_regex, some
from .safetensors_io import Entry, Reader, TensorFile

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth", ".ckpt", ".bin")
OUTPUTS = "reconstructed"
"""Name of the folder that outputs are written to, in the folder that they are made of."""
INDEX = ".index.json"
"""How the names end of files that tell which file holds which array."""
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


@dataclass(frozen=True)
class FoundFile:
    """Stored weights: the name that may tell their time, and their file, or the index of their files."""

    name: str
    path: Path


def find_files(folder: Path, pattern: str | None, /) -> list[FoundFile]:
    """The weights in a run, in any folder, or in the folders of checkpoints in it, of which ``pattern`` selects some.

    A single file beside folders of checkpoints is one of theirs: the last, of some trainers. Of an official pickle and
    the snapshot that was imported from it, beside it, the snapshot is taken; other pickles are taken too.

    Raises:
        InputError: none, files of several kinds, or checkpoints with several weights of which none is selected.
    """
    folder = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    paths = _weights_in(folder)
    imported = {path.stem for path in paths if path.suffix == ".safetensors"}
    paths = [path for path in paths if path.suffix != ".pkl" or path.stem not in imported]
    kinds = Counter(_whole(path).suffix for path in paths)
    if len(kinds) > 1 and kinds.keys() != {".pkl", ".safetensors"}:
        seen = " and ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
        raise InputError(f"files of a folder must be of one kind, got {seen} in {folder}: move the others away")
    files = [FoundFile(_whole(path).stem, path) for path in paths]
    if len(files) > 1:
        return files
    if checkpoints := [found for inner in _folders_in(folder) for found in _checkpoint(folder, inner)]:
        return _selected(checkpoints + files, pattern)
    if files:
        return files
    seen = ", ".join(sorted(path.name for path in folder.glob("*"))[:5]) or "nothing"
    raise InputError(f"a folder must hold snapshots ({', '.join(SUFFIXES)}), got {seen} in {folder}: check the path")


def _weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder; an index instead of the files that it names."""
    indices = [path for path in folder.glob(f"*{INDEX}") if _whole(path).suffix in SUFFIXES]
    files = [path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file()]
    if indices:
        files = [path for path in files if not re.search(r"-\d+-of-\d+$", path.stem)]
    return sorted(path for path in indices + files if not path.name.startswith(_NOT_WEIGHTS))


def _whole(path: Path) -> Path:
    """The file that an index stands for; other files are what they are."""
    return path.with_name(path.name.removesuffix(INDEX))


def _folders_in(folder: Path) -> list[Path]:
    """The folders in ``folder``, except that of outputs, and those in them."""
    inside = (path for path in folder.glob("*") if path.name != OUTPUTS and not path.name.startswith("."))
    outer = sorted(path for path in inside if path.is_dir())
    return [path for one in outer for path in (one, *sorted(inner for inner in one.glob("*") if inner.is_dir()))]


def _checkpoint(folder: Path, inner: Path) -> list[FoundFile]:
    """The weights in a folder of a checkpoint, under the folder's name, and their own where there are several;
    safetensors if there are others too."""
    name, paths = inner.relative_to(folder).as_posix(), _weights_in(inner)
    best = [path for path in paths if _whole(path).suffix == ".safetensors"] or paths
    if len(best) == 1:
        return [FoundFile(name, best[0])]
    return [FoundFile(f"{name}/{_whole(path).stem}", path) for path in best]


def _selected(found: list[FoundFile], pattern: str | None) -> list[FoundFile]:
    """Those that ``pattern`` matches; without it all, if there is one in each checkpoint, and one besides at most."""
    if pattern is not None:
        if chosen := [one for one in found if pattern_regex(pattern).fullmatch(one.name)]:
            return chosen
        got = some([one.name for one in found])
        raise InputError(f"--pattern must match a folder with weights, got {pattern} for {got}: change it")
    kinds = sorted({_kind(one.name) for one in found})
    numbered = [kind for kind in kinds if TIME in kind]
    if len(numbered) > 1 or len(kinds) - len(numbered) > 1:
        raise InputError(
            f"checkpoints must hold one network each, got {len(kinds)}, {some(kinds)}: choose one with --pattern "
            + " or ".join(map(repr, (numbered or kinds)[:3]))
        )
    return found


def _kind(name: str) -> str:
    """The pattern of a checkpoint's name whose time is the last number of its folder's name."""
    outer, slash, inner = name.partition("/")
    *before, after = re.split(r"\d+", outer)
    return ("*".join(before) + TIME if before else "") + after + slash + inner


class ShardedFile:
    """Arrays in several files of one folder, by its index; a :class:`~.safetensors_io.Reader`.

    Raises:
        InputError: a damaged index or file, or an array that is not where the index says.
    """

    def __init__(self, index: Path) -> None:
        self.path = index
        try:
            places = dict(parse_json(index.read_text(encoding="utf-8"))["weight_map"])
            files = {name: _part(index.with_name(Path(name).name)) for name in set(places.values())}
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


def _part(path: Path) -> Reader:
    if path.suffix == ".safetensors":
        return TensorFile(path)
    from .torch_files import TorchFile

    return TorchFile(path)
