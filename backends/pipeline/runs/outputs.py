"""The files that sampling writes.

png      a picture per seed, and a grid
npz      samples.npz: images [n, height, width, channels], labels, seeds
npy      samples.npy: images [n, channels, height, width]
latents  samples.npz: latents [n, channels, height, width], not decoded, labels, seeds

8-bit images, and images decoded from latents, are uint8; all else is float32 in the data's own units, neither clipped
nor rounded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from backends.pipeline.checkpoints.atomic import write_atomically
from edm2_core.codec import DataFormat

from .pictures import save_grid, save_images, to_uint8, visible

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


def write(kind: Kind, outdir: Path, images: np.ndarray, *, labels: np.ndarray, seeds: Sequence[int]) -> list[Path]:
    """Write ``images``, in the order of ``seeds``. Returns what was written, as it is to be shown."""
    if kind == "png":
        save_images(outdir, images, [f"{seed:06d}.png" for seed in seeds])
        save_grid(outdir / "grid.png", images[:_IN_GRID])
        return [outdir / "grid.png", outdir / f"{seeds[0]:06d}.png ... {seeds[-1]:06d}.png"]
    if kind == "npy":
        path = outdir / "samples.npy"
        write_atomically(path, lambda file: np.save(file, images))
        return [path]
    path, name = outdir / "samples.npz", "latents" if kind == "latents" else "images"
    arrays = images if kind == "latents" else images.transpose(0, 2, 3, 1)

    def save(file: BinaryIO) -> None:
        parts: dict[str, Any] = {name: arrays, "labels": labels, "seeds": np.array(seeds, np.int64)}
        np.savez(file, **parts)

    write_atomically(path, save)
    return [path]
