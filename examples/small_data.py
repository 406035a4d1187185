"""How large a network, how much dropout and how long a training a small data set wants: what --preset auto is based on.

    python -m examples.small_data       # half an hour on two cores

The data are tiles of 16x16 pixels, cut without overlap from the photographs that scikit-image and scikit-learn ship.
Each row trains a network on some of them, with a tenth held out, and prints: the lowest held-out loss of the weights,
and after how many images of training it was; the loss at the end; and the Fréchet distance by pixels of 500 samples at
the end, from averages of length 0.10, to 2000 tiles that no run has seen.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from backends.pipeline.metrics.extractors import open_extractor
from backends.pipeline.metrics.statistics import Statistics, collect
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.job import batches, job_of_run
from backends.pipeline.runs.networks import stored_network
from edm2_core.frechet import distance
from examples.photographs import SUBJECTS

SIDE, REFERENCE, SAMPLES = 16, 2000, 500
CHOICES = (  # channels, dropout, further words
    (16, 0.0, ()),
    (32, 0.0, ()),
    (32, 0.1, ()),
    (32, 0.1, ("--flip",)),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this example."""

    outdir: Path = Path("small-data")
    """Folder of the data and the runs."""
    port: Literal["torch", "jax", "mlx"] = "torch"
    """Port that trains and samples."""
    counts: tuple[int, ...] = (300, 1500, 6000)
    """Sizes of the data sets."""
    duration: int = 16 * 1024
    """Images to train on."""


def tiles() -> np.ndarray:
    """Tiles of the photographs in a random order, uint8 [n, 3, 16, 16]; as many of each photograph at most."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [*(getattr(skimage.data, name)() for name in SUBJECTS), *load_sample_images().images]
    found = []
    for photograph in photographs:
        colour = photograph if photograph.ndim == 3 else np.repeat(photograph[:, :, None], 3, axis=2)
        rows, columns = (side // SIDE for side in colour.shape[:2])
        cut = colour[: rows * SIDE, : columns * SIDE, :3].reshape(rows, SIDE, columns, SIDE, 3)
        each = cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
        found.append(rng.permutation(each)[:1000])
    return rng.permutation(np.concatenate(found))


def main(options: Options) -> None:
    everything = tiles()
    pixels = open_extractor("pixels")
    reference = collect([everything[:REFERENCE]], [pixels], keep=False)["pixels"]
    print(f"{len(everything)} tiles; images of training {options.duration}\n")
    print("images  channels  dropout  flip   lowest  after images (epochs)   at end  Fréchet")
    for count in options.counts:
        data = options.outdir / f"{count}.npz"
        data.parent.mkdir(parents=True, exist_ok=True)
        np.savez(data, images=everything[REFERENCE : REFERENCE + count].transpose(0, 2, 3, 1))
        for channels, dropout, words in CHOICES:
            run = Run(options.outdir / f"{count}-{channels}-{dropout}{'-flip' * len(words)}")
            _train(options, run, data, channels, dropout, words)
            losses = [(record["holdout"], record["nimg"]) for record in run.log() if "holdout" in record]
            least, at = min(losses)
            score = distance(_samples(options.port, run).gaussian, reference.gaussian)
            print(
                f"{count:6}  {channels:8}  {dropout:7g}  {'yes' if words else 'no':4}  {least:7.4f}  "
                f"{at:12} {at / (0.9 * count):8.1f}  {losses[-1][0]:7.4f}  {score:7.4f}",
                flush=True,
            )


def _train(options: Options, run: Run, data: Path, channels: int, dropout: float, words: tuple[str, ...]) -> None:
    network = ("--channels", channels, "--channels-per-head", channels, "--blocks", 1, "--dropout", dropout)
    duration = ("--duration", options.duration, "--status", 1024, "--snapshot", max(1024, options.duration // 16))
    chosen = ("--preset", "auto", "--batch", 64, "--lr", 0.0120 * (128 / channels) ** 0.5, *network, *words)
    always = ("--outdir", run.path, "--data", data, "--holdout", 0.1, "--no-picture", *duration)
    train = import_module(f"backends.{options.port}.train").main
    if train([str(word) for word in (always if run.exists() else (*always, *chosen))]):
        raise SystemExit(f"{run.path} stopped")


def _samples(port: str, run: Run) -> Statistics:
    """Statistics of samples by the average of length 0.10 at the end of a run."""
    job = job_of_run(stored_network(run.path), run, seeds=range(SAMPLES), solver={"num_steps": 8})
    sampler = import_module(f"backends.{port}.port").PORT.sampler
    made = batches(job, sampler, batch=100)
    return collect((one.images for one in made), [open_extractor("pixels")], keep=False)["pixels"]


if __name__ == "__main__":
    main(tyro.cli(Options))
