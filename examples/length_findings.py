"""The best averaging length over learning rate, duration, capacity and guidance, with its spread over seeds.

    python -m examples.length_findings [--port torch|jax|mlx] [--folder length-findings]      # 40 minutes on one core

Sections 3.3 and 4, Figures 6 and 13. For each of three seeds, networks are trained on 1500 digits, and a golden section
finds the length whose samples have the smallest Fréchet distance to held-out digits. A row gives the mean of that
length and of that distance, and their standard deviations over the seeds.
"""

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro

from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.sweeping import Domain, Point, search
from examples.digits import Study

RANGE = Domain("sigma-rel", (), 0.02, 0.25)
Words = tuple[object, ...]
RUNS: dict[str, Words] = {  # what differs from a rate of 0.05, 16Ki images and 32 channels
    "base": (),
    "rate 0.025": ("--lr", 0.025),
    "rate 0.1": ("--lr", 0.1),
    "48Ki images": ("--duration", "48Ki"),
    "16 channels": ("--channels", 16, "--channels-per-head", 16),
}
WEIGHTS = (1.5, 2.0)


@command
def main() -> None:
    tyro.cli(length_findings)


def length_findings(
    port: Literal["torch", "jax", "mlx"] = "torch",
    seeds: int = 3,
    points: int = 7,
    folder: Path = Path("length-findings"),
) -> None:
    """Train, search and print the table."""
    study, found = Study(folder, port=port), dict[str, list[tuple[float, float]]]()
    for seed in range(seeds):
        runs = {name: _train(study, f"{name}-{seed}", seed, *words) for name, words in RUNS.items()}
        guide = _train(study, f"guide-{seed}", seed, "--unconditional")
        for name, run in runs.items():
            found.setdefault(name, []).append(_best(study, run, points))
        for weight in WEIGHTS:
            found.setdefault(f"guidance {weight:g}", []).append(_best(study, runs["base"], points, guide, weight))
    print(f"\n{'':12}   length        distance    ({seeds} seeds)")
    for name, results in found.items():
        columns = [list(column) for column in zip(*results, strict=True)]
        spread = [stdev(column) if seeds > 1 else 0.0 for column in columns]
        shown = [f"{mean(column):.3f} ± {dev:.3f}" for column, dev in zip(columns, spread, strict=True)]
        print(f"{name:12}  {'  '.join(shown)}")


def _train(study: Study, name: str, seed: int, *words: object) -> Run:
    usual: Words = ("--lr", 0.05, "--duration", "16Ki", "--snapshot", "1Ki", "--seed", seed)
    return study.train(name.replace(" ", "-"), *usual, *words)


def _best(study: Study, run: Run, points: int, guide: Run | None = None, weight: float = 1.0) -> tuple[float, float]:
    """The best length, of the guide too, and its distance."""
    distances: dict[Point, float] = {}

    def average(of: Run, length: float) -> Snapshot:
        return study.averages(of, [length])[0]

    def ask(point: Point) -> float:
        (length,) = point
        other = None if guide is None else average(guide, length)
        images, _ = study.sample(average(run, length), guidance=weight, guide=other)
        distances[point] = study.frechet(images)
        return distances[point]

    search([RANGE], ask, kind="golden", points=points)
    best = min(distances, key=lambda point: distances[point])
    return best[0], distances[best]


if __name__ == "__main__":
    sys.exit(main())
