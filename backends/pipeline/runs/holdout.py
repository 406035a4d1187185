"""The loss on held-out data while a run trains: whether it still learns what is true of more than its own images.

Noise levels are the 10, 30, 50, 70 and 90 % quantiles of those in training; the noise of an image is the same each
time, so the curve is smooth. The loss is lambda(sigma) times the mean square error, of the weights themselves, not an
average.
"""

from collections.abc import Callable
from math import exp, isfinite
from statistics import NormalDist
from typing import Any

import numpy as np

from backends.pipeline.data.batches import stored_batch
from backends.pipeline.data.datasets import Dataset
from backends.pipeline.data.seeds import noise
from backends.trainer import Trainer

from .config import TrainConfig

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
MOST = 1024
"""The most images that are measured; the levels take turns."""
_RISE, _STATUSES = 1.01, 3


class HeldOut:
    """Measures the loss on ``dataset``; every process holds its share of the same images."""

    def __init__(self, config: TrainConfig, dataset: Dataset, trainer: Trainer) -> None:
        hyper, batch = config.hyper, config.hyper.batch
        share, rounds = batch // trainer.world, max(1, min(len(dataset), MOST) // batch)
        levels = [hyper.P_mean + hyper.P_std * NormalDist().inv_cdf(q) for q in QUANTILES]
        self.sigma = tuple(map(exp, levels))
        self._trainer, self._parts = trainer, []
        for first in range(trainer.rank * share, rounds * batch, batch):
            positions = np.arange(first, first + share)
            stored = stored_batch(dataset, positions % len(dataset))
            stored = stored._replace(
                labels=stored.labels if config.network.label_dim else None,
                flipped=np.zeros(share, bool) if config.flip else None,
            )
            which = positions % len(levels)
            sigma = np.array(self.sigma, np.float32)[which]
            self._parts.append((trainer.place(stored), noise(positions.tolist(), dataset.shape), sigma, which))

    def measure(self) -> dict[str, Any]:
        """Loss of each noise level, and their mean: fields of a line of the log. All processes must call it."""
        totals, counts = np.zeros(len(self.sigma)), np.zeros(len(self.sigma))
        for batch, unit_noise, sigma, which in self._parts:
            losses = self._trainer.evaluate(batch, unit_noise, sigma)
            totals += np.bincount(which, losses, len(self.sigma))
            counts += np.bincount(which, minlength=len(self.sigma))
        mean = self._trainer.mean_over_processes
        by_level = [mean(float(total)) / mean(float(count)) for total, count in zip(totals, counts, strict=True)]
        return {"holdout": float(np.mean(by_level)), "holdout_sigma": self.sigma, "holdout_by_sigma": by_level}


class Overfitting:
    """Says once that the held-out loss has turned up: where it was more than 1 % above its lowest value three times
    one after another."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._least, self._at, self._above, self._said = say, float("inf"), 0, 0, False

    def __call__(self, loss: float, nimg: int) -> None:
        if not isfinite(loss):
            return
        if loss < self._least:
            self._least, self._at = loss, nimg
        self._above = self._above + 1 if loss > self._least + (_RISE - 1) * abs(self._least) else 0
        if self._above == _STATUSES and not self._said:
            self._said = True
            self._say(
                f"warning: the held-out loss has risen from {self._least:.4f} at {self._at} images to {loss:.4f} at "
                f"{nimg}: the network learns its own images by heart; use a snapshot from before, a shorter "
                "--duration, --dropout, --flip or more data"
            )
