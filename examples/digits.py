"""Shared code of the studies on handwritten digits: data with held-out digits, runs, averages and metrics.

Accuracy is the share of samples that a support vector machine, fitted to all real digits, classifies as their label.
The Fréchet distance is that between Gaussians fitted to the pixels, in [0, 1], of samples and of held-out digits: like
FID, without a network. Both rank networks; their values are not comparable with FID.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.data.labels import one_hot
from backends.pipeline.data.seeds import labels as seeded_labels
from backends.pipeline.data.seeds import noise
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.pictures import visible
from edm2_core.codec import PIXELS, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.loss import weight

TRAINING = 1500  # of 1797
CLASSES = 10
SAMPLES, STEPS = 500, 16


class Study:
    """Runs of one port under ``folder``, on the first ``count`` digits, at most 1500; the last 297 are held out.

    A subclass may be of other images: their number to train on, of classes, and the options of every run.
    """

    training, classes = TRAINING, CLASSES
    options: tuple[object, ...] = ("--preset", "digits")

    def __init__(self, folder: Path, *, port: str = "torch", count: int | None = None):
        self.folder, self.port, self.count = folder, port, count or self.training
        self.images, self.labels = self._read()
        self.data = folder / "data"
        if not (self.data / "dataset.json").exists():
            self._write()

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """All images, uint8 [n, C, H, W], and their class ids; those held out are the last."""
        digits = open_dataset("digits")
        indices = np.arange(len(digits))
        return digits.read(indices), digits.labels(indices)

    def _write(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        names = [f"{i:04d}.png" for i in range(self.count)]
        for name, image in zip(names, self.images, strict=False):
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(self.data / name)
        pairs = [[name, int(label)] for name, label in zip(names, self.labels, strict=False)]
        (self.data / "dataset.json").write_text(json.dumps({"labels": pairs}))

    def train(self, name: str, *options: object) -> Run:
        """Train or resume the run ``name`` with ``options`` of the train command; a complete run is kept.

        Raises:
            InputError: the command fails.
        """
        run = Run(self.folder / name)
        command = import_module(f"backends.{self.port}.train").main
        first = () if run.exists() else (*self.options, "--data", self.data)
        print(f"\n{name}: python -m backends.{self.port}.train {' '.join(map(str, options))}", flush=True)
        if command([*map(str, (*first, *options)), "--outdir", str(run.path), "--no-picture"]):
            raise InputError(f"a run must be complete, got {run.path}, which stopped: see the message above")
        return run

    def averages(self, run: Run, sigma_rels: Sequence[float], *, at: int | None = None) -> list[Snapshot]:
        """The averages of these lengths after ``at`` images (None: at the end of ``run``), stored or reconstructed."""
        return reconstruct(run.snapshots(run.config().network), time=at, sigma_rels=list(sigma_rels))

    def at(self, run: Run, nimg: int, sigma_rel: float) -> Snapshot:
        """The first stored average of this length at or after ``nimg``."""
        sources = run.snapshots(run.config().network)
        return next(s for s in sources if s.length == Length.of(sigma_rel) and s.time >= nimg).load()

    def losses(self, run: Run, sigma_rels: Sequence[float]) -> list[float]:
        """The denoising loss on held-out images of the averages of these lengths."""
        return [self.denoising_loss(network, held_out=True) for network in self.averages(run, sigma_rels)]

    def sample(
        self,
        network: Snapshot,
        *,
        count: int = SAMPLES,
        guidance: float = 1.0,
        guide: Snapshot | None = None,
        labelled: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images, uint8 [count, 1, 8, 8], of the first ``count`` seeds, sampled in 16 steps, and their class ids.

        ``guide`` None is the network without its label, trained so or not; without ``labelled`` no label is given.
        """
        seeds, config = range(count), network.required_config()
        other = None if guide is None else (guide.required_config(), guide.params)
        sampler = self._adapter.sampler(config, network.params, guide=other)
        labels = seeded_labels(seeds, self.classes)
        rows = one_hot(labels, self.classes) if labelled else None
        start = noise(seeds, (config.img_channels, *config.image_size))
        return visible(sampler(start, rows, guidance=guidance, num_steps=STEPS), DataFormat()), labels

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float((self._classifier.predict(_scanned(images)) == labels).mean())

    def frechet(self, images: np.ndarray) -> float:
        """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2), between ``images`` and the held-out digits."""
        (m, c), (n, d) = (_gaussian(_flat(x)) for x in (images, self.images[self.training :]))
        product = np.linalg.eigvals(c @ d).real  # real and not negative, except for rounding
        return float(np.sum((m - n) ** 2) + np.trace(c + d) - 2 * np.sqrt(product.clip(0)).sum())

    def denoising_loss(self, network: Snapshot, *, held_out: bool) -> float:
        """Mean of lambda(sigma) (D(y + n; sigma) - y)^2 per pixel, with fixed noise, on training or held-out digits."""
        held = len(self.images) - self.training
        part = slice(self.training, None) if held_out else slice(0, min(self.count, held))
        images, rows = PIXELS.encode(self.images[part]), one_hot(self.labels[part], self.classes)
        seeds, total = range(len(images)), 0.0
        for sigma in np.exp(np.linspace(-2, 1, 7)):
            level = np.full((len(images), 1, 1, 1), sigma, np.float32)
            noisy = images + level * noise(seeds, images.shape[1:])
            denoised, _ = self._adapter.denoise(network.required_config(), network.params, noisy, level, rows)
            total += float(np.mean(weight(level) * np.square(denoised - images)))
        return total / 7

    @cached_property
    def _classifier(self) -> SVC:
        return SVC(gamma=0.001).fit(_scanned(self.images), self.labels)

    @cached_property
    def _adapter(self):  # type: ignore[no-untyped-def]
        return import_module(f"backends.{self.port}.port").PORT


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def _scanned(images: np.ndarray) -> np.ndarray:
    """Pixels in the range of the scanned digits, 0 to 16, as rows."""
    return 16 * _flat(images)


def _gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(axis=0), np.cov(x, rowvar=False)
