"""Dropout against overfitting: the loss on training digits and on held-out digits, over training (Figure 12).

    python -m examples.overfitting [--port torch|jax|mlx] [--folder overfitting]

Trains on only 200 digits, with several dropout rates. After its minimum, the loss on held-out digits rises again.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from backends.pipeline.runs.exit_codes import command
from examples.digits import Study


@command
def main() -> None:
    tyro.cli(overfitting)


def overfitting(
    port: Literal["torch", "jax", "mlx"] = "torch",
    duration: str = "64Ki",
    count: int = 200,
    dropout: tuple[float, ...] = (0.0, 0.1, 0.3),
    folder: Path = Path("overfitting"),
) -> None:
    """Train on COUNT digits for DURATION images, once with each DROPOUT."""
    study = Study(folder, port=port, count=count)
    runs = [
        study.train(f"dropout-{share:g}", "--dropout", share, "--duration", duration, "--snapshot", "8Ki")
        for share in dropout
    ]
    print("\nimages  " + "".join(f"  seen {share:<4g}    held out" for share in dropout))
    for nimg in sorted({source.time for source in runs[0].snapshots(runs[0].config().network)}):
        networks = [study.at(run, nimg, 0.05) for run in runs]
        pairs = [[study.denoising_loss(network, held_out=held) for held in (False, True)] for network in networks]
        print(f"{nimg:6}  " + "".join(f"{seen:11.4f} {held:11.4f}" for seen, held in pairs), flush=True)


if __name__ == "__main__":
    sys.exit(main())
