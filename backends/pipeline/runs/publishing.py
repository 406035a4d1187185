"""What is published of a network: its folder on the hub, which every command reads as a network or a run.

Of a run: config.json, snapshots/, and pictures in samples/. Of one network: config.json, which describes it, and
model.safetensors. README.md is the model card (:mod:`.model_card`). What the config says of this machine stays here:
paths become names.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.reconstruct import WITHIN
from backends.pipeline.checkpoints.remote import is_url, local
from backends.pipeline.checkpoints.safetensors_io import read_array, write_tensors
from backends.pipeline.checkpoints.snapshots import (
    Metadata,
    description,
    metadata_text,
    save_snapshot,
    snapshot_name,
)
from backends.pipeline.checkpoints.sources import Source
from edm2_core.codec import Codec, DataFormat
from edm2_core.errors import InputError

from .config import TrainConfig
from .evaluation import FIGURES, read_figures
from .folder import Run, is_run
from .model_card import Card, card_text
from .networks import WEIGHTS, average_of, open_network

CARD, CONFIG = "README.md", "config.json"
Files = Mapping[str, Path | bytes]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a person chooses about it. ``address``: hf://user/name, or a folder. Of a run: the average of length
    ``sigma_rel``, reconstructed if it is not stored; ``every`` stored one; or, without either, those of the newest
    time. ``pictures``: instead of those in the run's samples."""

    source: Path
    address: str
    licence: str
    sigma_rel: float | None = None
    every: bool = False
    pictures: Sequence[Path] = ()


@contextmanager
def opened(publication: Publication, /) -> Iterator[Files]:
    """The files, by their names in the repository: paths, or contents. Averages that are made for it are there until
    the end of the context.

    Raises:
        InputError: no such network or average, or the choice does not fit it.
    """
    if publication.sigma_rel is not None and publication.every:
        raise InputError("--sigma-rel and --all exclude each other, got both: give one of them")
    for picture in publication.pictures:
        if picture.suffix != ".png" or not _is_whole_picture(picture):
            raise InputError(f"--pictures must be .png files that can be read, got {picture}: check it")
    source = local(publication.source)
    run, one = _run_of(source)
    with TemporaryDirectory(prefix="edm2-publish-") as folder:
        yield (
            _of_network(publication, source, Path(folder))
            if run is None
            else _of_run(publication, run, one, Path(folder))
        )


def write_folder(files: Files, folder: Path, /) -> None:
    """Write the files into a new folder. Raises InputError where it exists."""
    if folder.exists():
        raise InputError(f"--outdir must be a new folder, got {folder}, which exists: choose another")
    for name, content in files.items():
        write_bytes(folder / name, content if isinstance(content, bytes) else content.read_bytes())


def _run_of(source: Path) -> tuple[Run | None, Path | None]:
    """The run at ``source``, or that of the snapshot there; None for a network of which no run is known."""
    if source.is_dir():
        return (Run(source) if is_run(source) else None), None
    folder = source.parent.parent
    within = source.parent.name == "snapshots" and is_run(folder) and source.suffix == ".safetensors"
    return (Run(folder), source) if within else (None, None)


def _of_network(publication: Publication, source: Path, folder: Path) -> Files:
    if publication.every:
        raise InputError(f"--all needs a run, got {publication.source}: leave it out")
    metadata = open_network(source, sigma_rel=publication.sigma_rel).snapshot
    metadata = replace(metadata, data=metadata.data and public_format(metadata.data))
    save_snapshot(folder / WEIGHTS, metadata)
    pictures = _pictures(publication.pictures)
    card = Card(publication.address, publication.licence, [metadata], pictures=list(pictures))
    described = json.dumps(description(metadata), indent=1).encode() + b"\n"
    return {CARD: card_text(card).encode(), CONFIG: described, WEIGHTS: folder / WEIGHTS, **pictures}


def _of_run(publication: Publication, run: Run, one: Path | None, folder: Path) -> Files:
    config = run.config()
    sources = run.snapshots(config.network)
    if not sources:
        raise InputError(f"a run must have snapshots to publish, got none in {run.path}: train it longer")
    if one is not None and (publication.sigma_rel is not None or publication.every):
        raise InputError(f"--sigma-rel and --all choose averages of a run, got one snapshot, {one}: give the run")
    averages = _chosen(publication, sources, one, folder)
    pictures = _pictures(publication.pictures or _sampled(run))
    config = public(config)
    metadata = list(averages.values())
    figures = read_figures(run.path / FIGURES)
    card = Card(publication.address, publication.licence, metadata, config, figures, list(pictures))
    snapshots = {f"snapshots/{path.name}": path for path in averages}
    return {CARD: card_text(card).encode(), CONFIG: config.to_json().encode(), **snapshots, **pictures}


def _chosen(
    publication: Publication, sources: Sequence[Source], one: Path | None, folder: Path
) -> dict[Path, Metadata]:
    """Files of averages, and what they hold."""
    if publication.sigma_rel is not None:
        snapshot, length, error = average_of(sources, publication.sigma_rel)
        if error is not None:
            if error > WITHIN:
                raise InputError(
                    f"--sigma-rel must be a length that snapshots give, got {length}, with a predicted error of "
                    f"{error:.0%}: choose another"
                )
            path = folder / snapshot_name(snapshot.nimg, length)
            snapshot = replace(snapshot, data=snapshot.data and public_format(snapshot.data))
            save_snapshot(path, snapshot)
            return {path: snapshot}
        sources = [source for source in sources if (source.time, source.length) == (sources[-1].time, length)]
    elif one is not None:
        sources = [source for source in sources if source.path.name == one.name]
    elif not publication.every:
        sources = [source for source in sources if source.time == sources[-1].time]
    return dict(_public_file(one, folder) for one in sources)


def _public_file(source: Source, folder: Path) -> tuple[Path, Metadata]:
    """The file of an average and what it holds; of one that names a path of this machine, a copy that does not."""
    stored, format = replace(source.metadata, length=source.length), source.metadata.data
    if format is None or public_format(format) == format:
        return source.path, stored
    arrays = {name: read_array(source.reader, name, exactly=True) for name in source.reader.entries}
    metadata = replace(stored, data=public_format(format))
    write_tensors(folder / source.path.name, arrays, metadata_text(metadata))
    return folder / source.path.name, metadata


def _sampled(run: Run) -> list[Path]:
    """The picture of averages of many lengths, and the newest grid of samples, where there are any."""
    grids = sorted(run.samples_path.glob("*/grid.png"), key=lambda path: (path.stat().st_mtime_ns, path))
    lengths = run.samples_path / "lengths.png"
    return [*grids[-1:], *([lengths] if lengths.is_file() else [])]


def _is_whole_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.load()
        return True
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for broken files
        return False


def _pictures(paths: Sequence[Path]) -> dict[str, Path]:
    """Pictures by their names in the repository. Raises InputError where two have one name."""
    named = {f"samples/{path.name}": path for path in paths}
    if len(named) < len(paths):
        raise InputError("--pictures must have different names, got one twice: rename it")
    return named


# ---- privacy


def public(config: TrainConfig, /) -> TrainConfig:
    """``config`` with names for paths of this machine, and without passwords in URLs."""
    names: dict[str, Any] = {name: public_name(getattr(config, name)) for name in ("data", "condition", "init")}
    if (summary := config.data_summary) is not None:
        names["data_summary"] = replace(summary, format=public_format(summary.format))
    return replace(config, **names)


def public_format(format: DataFormat, /) -> DataFormat:
    """``format`` with the names of autoencoders for their paths."""

    def named(codec: Codec) -> Codec:
        return replace(codec, vae=public_name(codec.vae))

    return replace(format, codec=named(format.codec), condition=format.condition and named(format.condition))


def public_name(place: str | None, /) -> str | None:
    """What a path or URL may be called in public."""
    if place is None:
        return None
    if is_url(place):
        return re.sub(r"//[^/@]*@", "//", place)
    return Path(place).name if Path(place).is_absolute() else place
