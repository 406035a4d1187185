"""Which network should guide? Four guides of one network on handwritten digits (Section 3.3; arXiv 2406.02507).

    python -m examples.guidance [--port torch|jax|mlx] [--folder guidance]

The guides: the network itself without a label, which it has never been trained without; itself, trained with label
dropout; a network trained without labels; and an earlier snapshot of itself, which knows the label (autoguidance).
For each, the Fréchet distance to held-out digits of the guide's own samples and of guided ones, and the share of guided
samples that are classified as their label.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from backends.pipeline.runs.exit_codes import command
from examples.digits import SAMPLES, Study

LENGTH = 0.05


@command
def main() -> None:
    tyro.cli(guidance)


def guidance(
    port: Literal["torch", "jax", "mlx"] = "torch",
    duration: str = "32Ki",
    earlier: int = 8 << 10,
    weights: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0),
    samples: int = SAMPLES,
    folder: Path = Path("guidance"),
) -> None:
    """Train three networks for DURATION images; draw SAMPLES images with each guide at each of WEIGHTS."""
    study = Study(folder, port=port)
    common = ("--duration", duration, "--snapshot", "1Ki")
    run = study.train("run", *common)
    (network,) = study.averages(run, [LENGTH])
    (dropped,) = study.averages(study.train("label-dropout", *common, "--label-dropout", 0.1), [LENGTH])
    (unlabelled,) = study.averages(study.train("unconditional", *common, "--unconditional"), [LENGTH])
    (shorter,) = study.averages(run, [LENGTH], at=earlier)
    guides = {  # name: (the network that is guided, its guide, whether the guide is given the label)
        "none": (network, network, False),
        "label dropout": (dropped, dropped, False),
        "unconditional": (network, unlabelled, False),
        "shorter run": (network, shorter, True),
    }
    print("\nguide            alone" + "".join(f"{f'x {weight:g}':>16}" for weight in weights))
    for name, (net, guide, labelled) in guides.items():
        alone, _ = study.sample(guide, count=samples, labelled=labelled)
        print(f"{name:14}{study.frechet(alone):8.4f}", end="")
        for weight in weights:
            own = guide is net  # without its label
            images, labels = study.sample(net, count=samples, guidance=weight, guide=None if own else guide)
            print(f"{study.frechet(images):8.4f} {study.accuracy(images, labels):6.1%} ", end="", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(main())
