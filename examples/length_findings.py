"""The best averaging length over learning rate, duration, capacity and guidance, with its spread over seeds.

    python -m examples.length_findings                         # digits
    python -m examples.length_findings --data photographs

Sections 3.3 and 4, Figures 6 and 13. Networks are trained with each of three seeds, and a golden section finds the
length that is best by a metric: of 1500 digits, the Fréchet distance of samples to held-out digits; of 600 crops of
photographs, the denoising loss on held-out crops. A row gives the means of that length and of the metric there, and
their standard deviations over the seeds.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np
import tyro

from backends.commands.cli import main as edm2
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.sweeping import Domain, Point, search
from examples.digits import Study
from examples.photographs import SUBJECTS, make_pictures

RANGE = Domain("sigma-rel", (), 0.02, 0.25)
Words = tuple[object, ...]
WEIGHTS = (1.5, 2.0)


class Digits(Study):
    runs: dict[str, Words] = {  # noqa: RUF012
        "base": (),  # a rate of 0.05, 16Ki images and 32 channels
        "rate 0.025": ("--lr", 0.025),
        "rate 0.1": ("--lr", 0.1),
        "48Ki images": ("--duration", "48Ki"),
        "16 channels": ("--channels", 16, "--channels-per-head", 16),
    }
    usual: Words = ("--lr", 0.05, "--duration", "16Ki", "--snapshot", "1Ki")

    def metric(self, network: Snapshot) -> float:
        return self.frechet(self.sample(network)[0])


class Photographs(Study):
    training, classes = 600, len(SUBJECTS) + 2
    options = (
        *("--channel-mult", 1, 2, 2, "--blocks", 1, "--attention", 0, "--channels-per-head", 8),
        *("--batch", 32, "--rampup", 1024),
    )
    runs: dict[str, Words] = {  # noqa: RUF012
        "base": (),  # a rate of 0.03, 8Ki images and 16 channels
        "rate 0.015": ("--lr", 0.015),
        "rate 0.06": ("--lr", 0.06),
        "24Ki images": ("--duration", "24Ki"),
        "8 channels": ("--channels", 8),
    }
    usual: Words = ("--lr", 0.03, "--duration", "8Ki", "--snapshot", "1Ki", "--channels", 16)

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        pictures, path = self.folder / "pictures", self.folder / "all.zip"
        if not pictures.exists():
            make_pictures(pictures, 60)
        if not path.exists():
            words = ("--resolution", "16x16", "--transform", "center-crop")
            edm2(["dataset", "convert", str(pictures), str(path), *words])
        crops = open_dataset(str(path))
        order = np.random.default_rng(0).permutation(len(crops))
        return crops.read(order), crops.labels(order)

    def metric(self, network: Snapshot) -> float:
        return self.denoising_loss(network, held_out=True)


STUDIES: dict[str, type[Digits] | type[Photographs]] = {"digits": Digits, "photographs": Photographs}


@command
def main() -> None:
    tyro.cli(length_findings)


def length_findings(
    data: Literal["digits", "photographs"] = "digits",
    port: Literal["torch", "jax", "mlx"] = "torch",
    seeds: int = 3,
    points: int = 7,
    folder: Path = Path("length-findings"),
) -> None:
    """Train, search and print the table. Guidance is measured by samples, so only on digits."""
    study, found = STUDIES[data](folder / data, port=port), dict[str, list[tuple[float, float]]]()
    for seed in range(seeds):
        runs = {name: _train(study, f"{name}-{seed}", seed, *words) for name, words in study.runs.items()}
        for name, run in runs.items():
            found.setdefault(name, []).append(_best(_plain(study, run), points))
        if isinstance(study, Digits):
            guide = _train(study, f"guide-{seed}", seed, "--unconditional")
            for weight in WEIGHTS:
                of_weight = _guided(study, runs["base"], guide, weight)
                found.setdefault(f"guidance {weight:g}", []).append(_best(of_weight, points))
    metric = "distance" if data == "digits" else "loss"
    print(f"\n{'':12}   {'length':16}{metric}    ({seeds} seeds)")
    for name, results in found.items():
        columns = [list(column) for column in zip(*results, strict=True)]
        spread = [stdev(column) if seeds > 1 else 0.0 for column in columns]
        shown = [f"{mean(column):.3f} ± {dev:.3f}" for column, dev in zip(columns, spread, strict=True)]
        print(f"{name:12}   {'   '.join(shown)}")


def _train(study: Digits | Photographs, name: str, seed: int, *words: object) -> Run:
    return study.train(name.replace(" ", "-"), *study.usual, "--seed", seed, *words)


def _at(study: Study, run: Run, length: float) -> Snapshot:
    return study.averages(run, [length])[0]


def _plain(study: Digits | Photographs, run: Run) -> Callable[[float], float]:
    return lambda length: study.metric(_at(study, run, length))


def _guided(study: Study, run: Run, guide: Run, weight: float) -> Callable[[float], float]:
    """The metric of samples guided by an average of ``guide`` of the same length."""

    def metric(length: float) -> float:
        images, _ = study.sample(_at(study, run, length), guidance=weight, guide=_at(study, guide, length))
        return study.frechet(images)

    return metric


def _best(metric: Callable[[float], float], points: int) -> tuple[float, float]:
    """The length with the least ``metric``, and that."""
    values: dict[Point, float] = {}

    def ask(point: Point) -> float:
        values[point] = metric(point[0])
        return values[point]

    search([RANGE], ask, kind="golden", points=points)
    best = min(values, key=lambda point: values[point])
    return best[0], values[best]


if __name__ == "__main__":
    sys.exit(main())
