"""The paper's ladder on handwritten digits: trains CONFIG A to G at equal budget and compares their samples.

    python -m examples.ladder [--port torch|jax|mlx] [--duration 32Ki] [--folder ladder]

Ends with a table, and a report page with the runs side by side. Complete runs are kept, stopped ones are resumed.
Results and their limits: docs/ladder.md.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from backends.commands import report
from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.folder import Run
from edm2_core.ladder import RUNGS, Rung
from examples.digits import SAMPLES, STEPS, Study

LENGTHS = (0.05, 0.10, 0.15, 0.20)


@command
def main() -> None:
    tyro.cli(ladder)


def ladder(
    port: Literal["torch", "jax", "mlx"] = "torch",
    duration: str = "32Ki",
    rungs: tuple[Rung, ...] = RUNGS,
    folder: Path = Path("ladder"),
    samples: int = SAMPLES,
) -> None:
    """Train RUNGS with PORT for DURATION images each, under FOLDER, and judge each by SAMPLES images."""
    study = Study(folder, port=port)
    # on CONFIG A too, whose traditional average reconstructs few lengths
    options = ("--duration", duration, "--telemetry", 20, "--sigma-rels", 0.05, 0.10)
    runs = {rung: study.train(rung, "--ladder", rung, *options) for rung in rungs}
    print("\nCONFIG  accuracy  Fréchet  at length  activation  weight")
    for rung, run in runs.items():
        print(row(study, rung, run, samples=samples), flush=True)
    paths = tuple(run.path for run in runs.values())
    report.run(report.Options(runs=paths, outdir=folder / "report", port=port, sigma_rels=LENGTHS, steps=STEPS))


def row(study: Study, rung: str, run: Run, *, samples: int) -> str:
    """A row of the table: metrics of the average with the smallest Fréchet distance, and the last magnitudes."""
    candidates = []
    for sigma_rel, network in zip(LENGTHS, study.averages(run, LENGTHS), strict=True):
        images, labels = study.sample(network, count=samples)
        candidates.append((study.frechet(images), study.accuracy(images, labels), sigma_rel))
    distance, accuracy, sigma_rel = min(candidates)
    *_, line = run.telemetry()
    last = line["blocks"].values()
    activation, weight = (max(block[f"{kind}_max"] for block in last) for kind in ("activation", "weight"))
    return f"{rung:6}  {accuracy:8.1%}  {distance:7.4f}  {sigma_rel:9.2f}  {activation:10.2f}  {weight:6.3f}"


if __name__ == "__main__":
    sys.exit(main())
