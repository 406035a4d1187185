"""Trained networks by what names them: a snapshot, an official pickle, a run, a folder of either, a published name."""

import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from backends.pipeline.checkpoints.atomic import write_atomically
from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.hub import SCHEME, hub_folder
from backends.pipeline.checkpoints.reconstruct import averages
from backends.pipeline.checkpoints.remote import CACHE, is_url, local, url_of
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, snapshot_name
from backends.pipeline.checkpoints.sources import Source, open_sources
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.published import URL

from . import shipped
from .folder import Run, any_run, is_run, newest

WEIGHTS = "model.safetensors"
"""The file of a folder that holds one network, as ``edm2 export`` and ``edm2 publish`` write it."""


@dataclass(frozen=True)
class FoundNetwork:
    """A network, its origin in words, the folder for its samples, and the run it is of, if that is known."""

    snapshot: Snapshot
    origin: str
    folder: Path
    run: Run | None = None


def stored_network(path: str | Path, /, *, sigma_rel: float | None = None) -> Snapshot:
    """The network in a file, or the latest average in a folder.

    Args:
        path: a snapshot, an official pickle, a run, or a folder of snapshots or of pickles; or the URL of one.
        sigma_rel: length of a folder's average, reconstructed if it is not stored; None: 0.10 if stored, else the
            longest.

    Raises:
        InputError: no such file or run, a folder without averages, or ``sigma_rel`` with a single file.
    """
    return open_network(path, sigma_rel=sigma_rel).snapshot


def open_network(path: str | Path, /, *, sigma_rel: float | None = None, train: str | None = None) -> FoundNetwork:
    """:func:`stored_network`, with its origin; ``train`` is the command to suggest."""
    address, url = str(path), url_of(path) if is_url(path) else None
    path = local(path)
    if [one.name for one in path.glob("*.safetensors")] == [WEIGHTS] and not is_run(path):
        path = path / WEIGHTS
    if not path.is_dir():
        if sigma_rel is not None:
            raise InputError(f"a single snapshot has one length, got sigma_rel {sigma_rel} for {path}: give the run")
        return FoundNetwork(_in_file(path), url or address, Path("samples"))
    run = Run(path) if is_run(path) else None
    sources = open_sources(path) if run is None else run.snapshots(run.config().network)
    if not sources:
        how = f"continue it with {train} --outdir {path}" if train else "train it longer"
        raise InputError(f"a run must have snapshots, got none in {url or path}: {how}")
    snapshot, length, error = average_of(sources, sigma_rel)
    snapshot.required_config()
    made = (
        f"reconstructed from {len(sources)} snapshots, predicted error {error:.1%}" if error is not None else "stored"
    )
    origin = f"{url or path} ({made})"
    name = Path(snapshot_name(snapshot.nimg, length)).stem
    if run is not None:
        run.url = url
    folder = Path("samples") if run is None or url is not None else run.samples_path
    return FoundNetwork(snapshot, origin, folder / name, run)


def _in_file(path: Path) -> Snapshot:
    if path.suffix == ".pt":
        raise InputError(
            f"a network must be a snapshot or an official network-snapshot-*.pkl, got {path}: a training state of the "
            "official code has no averages apart from its code; give the pickles beside it"
        )
    if path.suffix != ".pkl":
        return load_snapshot(path)
    from backends.pipeline.checkpoints.official import read_any

    return read_any(path)


def average_of(sources: Sequence[Source], sigma_rel: float | None, /) -> tuple[Snapshot, Length, float | None]:
    """The latest average of a run: the snapshot, its length, and the predicted error of its reconstruction; None of one
    that was stored."""
    stored = {source.length: source for source in sources if source.time == sources[-1].time}
    default = Length.of(0.10) if Length.of(0.10) in stored else max(stored)
    length = default if sigma_rel is None else Length.of(sigma_rel)
    if length in stored:
        return stored[length].load(), length, None
    combination = Combination.of(sources, sigma_rels=[length.value])
    (snapshot,) = averages(combination)
    return snapshot, length, float(combination.error.total[0])


def find_network(path: Path | None, /, *, sigma_rel: float | None, train: str) -> FoundNetwork:
    """The network at ``path``; None: of the newest run under runs/, without any the one that ships with edm2.

    Raises:
        InputError: no such run, network or length; ``train`` is the command to suggest.
    """
    if sigma_rel is not None:
        Length.of(sigma_rel)
    if path is not None:
        return open_network(path, sigma_rel=sigma_rel, train=train)
    if any_run():
        return open_network(newest(train=train), sigma_rel=sigma_rel, train=train)
    if sigma_rel is not None:
        raise InputError(f"--sigma-rel needs a run to choose from, got none under runs/: train one with {train}")
    found = open_network(shipped.PATH)
    return replace(found, origin=shipped.WHOSE)


# ---- published networks


def published_file(name: str, models: str | None, /) -> Path:
    """The file ``name`` of the published networks: in the folder ``models``; in a repository of the Hugging Face hub,
    hf://user/name; else in the cache, or downloaded to it from the address ``models``, by default the authors'.

    Raises:
        InputError: it is nowhere, and cannot be downloaded.
    """
    names = (name, f"{Path(name).stem}.safetensors")
    if models is not None and models.startswith(SCHEME):
        instead = f"download {URL}/{name}, and give its folder with --models"
        folder = hub_folder(models.removeprefix(SCHEME), names, instead=instead)
        if (found := _first(folder, names)) is None:
            raise InputError(f"--models must have {name}, got none in {models}: {instead}")
        return found
    address = models is not None and models.startswith(("http://", "https://"))
    folder = CACHE if models is None or address else Path(models)
    path = folder / name
    if (found := _first(folder, names)) is not None:
        return found
    url = f"{(models if address else URL)}/{name}"
    if models is not None and not address:
        raise InputError(f"--models must be a folder with {name}, got none in {folder}: download {url}")
    print(f"download {url} to {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as answer:
            write_atomically(path, lambda file: _copy(answer, file))
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise InputError(
            f"{name} must be in {folder} or be downloaded, got '{error}': fetch {url} elsewhere, and give its folder "
            "with --models"
        ) from error
    return path


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _copy(answer: Any, file: BinaryIO) -> None:
    """The whole answer to a request. Raises OSError where the connection ended early."""
    shutil.copyfileobj(answer, file)
    if (length := answer.headers.get("Content-Length")) is not None and file.tell() != int(length):
        raise ConnectionError(f"{file.tell()} of {length} bytes")
