"""The files that sampling writes.

png      a picture per seed, and a grid
npz      samples.npz: images [n, height, width, channels], labels, seeds
npy      samples.npy: images [n, channels, height, width]
latents  latents.npz: latents [n, channels, height, width], not decoded, labels, seeds

8-bit images, and images decoded from latents, are uint8; all else is float32 in the data's own units, neither clipped
nor rounded. Pictures are written as each batch is made; memory does not grow with their number in any format.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically, write_error
from edm2_core.codec import DataFormat

from .pictures import load_images, save_grid, save_images, to_uint8, visible

Kind = Literal["png", "npz", "npy", "latents"]
Finish = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]
"""Latents, float32 [n, c, h, w] in an autoencoder's own units, to images, float32 [n, 3, H, W] from -1 to 1."""
_IN_GRID = 100  # images


def finish(kind: Kind, format: DataFormat, decoder: Decode | None, /) -> Finish:
    """What makes of a network's samples, float32 [n, channels, height, width], what is written."""
    codec = format.codec
    if decoder is not None:
        decode = decoder
        return lambda samples: to_uint8(decode(codec.decode(samples)) * 127.5 + 127.5)
    if kind == "png":
        return lambda samples: visible(samples, format)
    if codec.stored == "uint8" and kind != "latents":
        return lambda samples: to_uint8(codec.decode(samples))
    return lambda samples: codec.decode(samples)


class Writer(Protocol):
    """Writes batches as they are made; ``close`` completes the files and returns them, as they are to be shown."""

    def add(self, made: "Batch", /) -> None: ...
    def close(self) -> list[Path]: ...


@dataclass(frozen=True)
class Batch:
    """Outputs [n, channels, height, width] of these seeds, and their labels."""

    images: np.ndarray
    seeds: Sequence[int]
    labels: np.ndarray


def seed_path(outdir: Path, seed: int, /, *, subdirs: bool) -> Path:
    """The picture of a seed; in a folder for each thousand, if there are ``subdirs``."""
    return outdir / (f"{seed - seed % 1000:06d}" if subdirs else "") / f"{seed:06d}.png"


class PictureFiles:
    """A :class:`Writer` of a PNG for each seed; and a grid of the first of the seeds in ``grid`` whose pictures are
    there at the end."""

    def __init__(self, outdir: Path, *, subdirs: bool = False, grid: Sequence[int] = ()) -> None:
        self._outdir, self._subdirs, self._grid = outdir, subdirs, grid
        self._ends: list[Path] = []

    def add(self, made: Batch, /) -> None:
        paths = [seed_path(self._outdir, seed, subdirs=self._subdirs) for seed in made.seeds]
        save_images(paths, made.images)
        self._ends = [*self._ends[:1], paths[-1]] if self._ends else [paths[0], paths[-1]]

    def close(self) -> list[Path]:
        files = [Path(f"{self._ends[0]} ... {self._ends[1].relative_to(self._outdir)}")] if self._ends else []
        shown = (seed_path(self._outdir, seed, subdirs=self._subdirs) for seed in self._grid[:_IN_GRID])
        if there := [path for path in shown if path.exists()]:
            save_grid(self._outdir / "grid.png", load_images(there))
            files.insert(0, self._outdir / "grid.png")
        return files


class OneFile:
    """A :class:`Writer` of one .npy or .npz: rows go to a hidden file as they are made, which becomes the file."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._path, self._kind = path, kind
        self._rows: BinaryIO | None = None
        self._seeds: list[int] = []
        self._labels: list[np.ndarray] = []
        self._shape: tuple[int, ...] = ()
        self._dtype: Any = None

    def add(self, made: Batch, /) -> None:
        rows = made.images.transpose(0, 2, 3, 1) if self._kind == "npz" else made.images
        if self._rows is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115, close() ends it
            self._shape, self._dtype = rows.shape[1:], rows.dtype
        try:
            self._rows.write(np.ascontiguousarray(rows).data)
        except OSError as error:
            raise write_error(self._path, error) from error
        self._seeds += made.seeds
        self._labels.append(made.labels)

    def close(self) -> list[Path]:
        if self._rows is None:
            return []
        write_atomically(self._path, self._array if self._kind == "npy" else self._archive)
        self._rows.close()
        return [self._path]

    def _array(self, file: Any) -> None:
        assert self._rows is not None
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(file, header | {"shape": (len(self._seeds), *self._shape)})
        self._rows.seek(0)
        shutil.copyfileobj(self._rows, file, 1 << 20)

    def _archive(self, file: BinaryIO) -> None:
        name = "latents" if self._kind == "latents" else "images"
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                self._array(part)
            for other, values in {"labels": np.concatenate(self._labels), "seeds": np.array(self._seeds)}.items():
                with archive.open(f"{other}.npy", "w") as part:
                    np.lib.format.write_array(part, values, allow_pickle=False)
