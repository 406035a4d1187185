"""From photographs of many sizes to samples: crops of the pictures that scikit-image and scikit-learn ship.

    python -m examples.photographs                            # about five minutes on two cores
    python -m examples.photographs --port jax --duration 1600

The steps are those for photographs of your own: convert, info, train with a held-out share, sample, report.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from backends.commands.cli import main as edm2

SUBJECTS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "retina", "rocket")
MODES = ("RGB", "L", "RGBA", "CMYK")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this example."""

    outdir: Path = Path("photographs")
    """Folder for pictures, data and the run."""
    port: Literal["torch", "jax", "mlx"] = "torch"
    """Port that trains and samples."""
    each: int = 60
    """Crops of each subject."""
    size: str = "32x32"
    """Width and height of the training images."""
    duration: int = 12 * 1024
    """Images to train on."""


def make_pictures(folder: Path, each: int) -> None:
    """A folder for each subject, of crops in many sizes, modes and formats."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    rng, samples = np.random.default_rng(0), load_sample_images()
    photographs = {name: getattr(skimage.data, name)() for name in SUBJECTS}
    photographs |= {Path(n).stem: image for n, image in zip(samples.filenames, samples.images, strict=True)}
    for name, photograph in photographs.items():
        height, width = photograph.shape[:2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            side = rng.integers(min(height, width) // 3, min(height, width) // 2, size=2)
            top, left = rng.integers(height - side[0]), rng.integers(width - side[1])
            crop = Image.fromarray(photograph[top : top + side[0], left : left + side[1]])
            mode = MODES[0] if photograph.ndim == 3 and i % 4 else MODES[i % len(MODES)]
            suffix = "tif" if mode == "CMYK" else "png" if mode == "RGBA" or i % 2 else "jpg"
            crop.convert("RGB").convert(mode).save(folder / name / f"{i:03d}.{suffix}")


def main(options: Options) -> None:
    pictures, data, run = (options.outdir / name for name in ("pictures", "data.zip", "run"))
    if not pictures.exists():
        make_pictures(pictures, options.each)

    def do(command: object, *words: object) -> None:
        print(f"\n$ {' '.join(map(str, words))}", flush=True)
        start = 1 if words[0] == "edm2" else 3
        if status := command(list(map(str, words[start:]))):  # type: ignore[operator]
            sys.exit(status)

    train, sample = (import_module(f"backends.{options.port}.{name}").main for name in ("train", "sample"))
    python = ("python", "-m")
    if not data.exists():
        do(
            edm2,
            "edm2",
            "dataset",
            "convert",
            pictures,
            data,
            "--resolution",
            options.size,
            "--transform",
            "center-crop",
        )
    do(edm2, "edm2", "dataset", "info", data, "--picture", options.outdir / "data.png")
    given = ("--data", data, "--outdir", run, "--flip", "--holdout", 0.1, "--duration", options.duration)
    small = ("--channels", 16, "--channel-mult", 1, 2, 2, "--blocks", 1, "--attention", 0, "--channels-per-head", 16)
    batch = ("--batch", 32, "--rampup", 1024, "--snapshot", 1024, "--lr", 0.03, "--no-picture")
    do(train, *python, f"backends.{options.port}.train", *given, *small, *batch)
    out = options.outdir / "samples"
    do(
        sample,
        *python,
        f"backends.{options.port}.sample",
        "--run",
        run,
        "--seeds",
        "0-23",
        "--steps",
        16,
        "--outdir",
        out,
    )
    do(edm2, "edm2", "report", run, "--no-samples")


if __name__ == "__main__":
    main(tyro.cli(Options))
