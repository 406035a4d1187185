"""Weights that are only normalized where they are used grow; weights that are forced onto their spheres cannot.

    python -m examples.weight_growth [--port torch|jax|mlx] [--folder weight-growth]

CONFIG D and E side by side over training: the mean magnitude of their weights, and the relative size of an update,
which shrinks as the weights grow (Figure 3, Eqs. 60 to 67). The learning rate is constant in both, so that nothing
else can be the reason.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.options import parse_count
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
        d, e = (np.mean([block["weight_mean"] for block in of]) for of in blocks)
        u, v = (np.mean([block["update"] for block in of]) for of in blocks)
        print(f"{pair[0]['nimg']:6}  {d:9.4f} {e:8.4f}  {u:9.5f} {v:8.5f}")


if __name__ == "__main__":
    sys.exit(main())
