"""The growth of weights without forced weight normalization (CONFIG D) and with it (CONFIG E).

    python -m examples.weight_growth [--port torch|jax|mlx] [--folder weight-growth]

Prints the mean magnitude of weights and the relative size of updates over training; in CONFIG D weights grow and so
updates shrink (Figure 3, Eqs. 60 to 67). The learning rate is constant in both.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from backends.pipeline.runs.command_line import parse_count
from backends.pipeline.runs.exit_codes import command
from edm2_core.presets import preset
from examples.digits import Study


@command
def main() -> None:
    tyro.cli(weight_growth)


def weight_growth(
    port: Literal["torch", "jax", "mlx"] = "torch", duration: str = "40Ki", folder: Path = Path("weight-growth")
) -> None:
    """Train CONFIG D and E for DURATION images each."""
    every = max(1, parse_count(duration) // preset("digits").hyper.batch // 8)
    study, options = Study(folder, port=port), ("--duration", duration, "--decay", 0, "--telemetry", every)
    lines = [list(study.train(rung, "--ladder", rung, *options).telemetry())[1:] for rung in "DE"]
    print("\nimages  weights D        E  updates D        E")
    for pair in zip(*lines, strict=True):
        blocks = [list(line["blocks"].values()) for line in pair]
        weights = [np.mean([block["weight_mean"] for block in line]) for line in blocks]
        updates = [np.mean([block["update"] for block in line]) for line in blocks]
        print("{:6}  {:9.4f} {:8.4f}  {:9.5f} {:8.5f}".format(pair[0]["nimg"], *weights, *updates))


if __name__ == "__main__":
    sys.exit(main())
