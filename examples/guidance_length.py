"""The best averaging length over guidance weights (Section 3.3, Figure 6).

    python -m examples.guidance_length [--port torch|jax|mlx] [--folder guidance-length]

The guide is a network trained without labels, or an earlier snapshot of the network (autoguidance). Each row is a
guidance weight: the Fréchet distance to held-out digits of samples from averages of five lengths, the best one marked.
The guide has an average of the same length.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from backends.pipeline.runs.exit_codes import command
from examples.digits import SAMPLES, Study

LENGTHS = (0.02, 0.05, 0.10, 0.15, 0.25)


@command
def main() -> None:
    tyro.cli(guidance_length)


def guidance_length(
    port: Literal["torch", "jax", "mlx"] = "torch",
    duration: str = "32Ki",
    guide: Literal["unconditional", "shorter"] = "unconditional",
    earlier: int = 8 << 10,
    weights: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0),
    samples: int = SAMPLES,
    folder: Path = Path("guidance-length"),
) -> None:
    """Train for DURATION images; draw SAMPLES images at each of WEIGHTS and each length."""
    study = Study(folder, port=port)
    common = ("--duration", duration, "--snapshot", "1Ki")
    run = study.train("run", *common)
    networks = study.averages(run, LENGTHS)
    if guide == "shorter":
        guides = study.averages(run, LENGTHS, at=earlier)
    else:
        guides = study.averages(study.train("unconditional", *common, "--unconditional"), LENGTHS)
    print("\nguidance" + "".join(f"{length:9.2f} " for length in LENGTHS))
    for weight in weights:
        pairs = zip(networks, guides, strict=True)
        sampled = (study.sample(net, count=samples, guidance=weight, guide=other)[0] for net, other in pairs)
        distances = [study.frechet(images) for images in sampled]
        marked = "".join(f"{distance:9.4f}{'*' if distance == min(distances) else ' '}" for distance in distances)
        print(f"{weight:8g}{marked}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
