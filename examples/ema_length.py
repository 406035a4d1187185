"""The best averaging length over learning rates and training durations (Section 3.3 and Figure 13).

    python -m examples.ema_length [--port torch|jax|mlx] [--folder ema-length]

Each row is a run: the denoising loss on held-out digits of averages of nine lengths, the best one marked.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

from backends.pipeline.runs.exit_codes import command
from examples.digits import Study

LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.15, 0.20)


@command
def main() -> None:
    tyro.cli(ema_length)


def ema_length(
    port: Literal["torch", "jax", "mlx"] = "torch",
    rates: tuple[float, ...] = (0.025, 0.05, 0.1),
    durations: tuple[str, ...] = ("16Ki", "48Ki"),
    folder: Path = Path("ema-length"),
) -> None:
    """Train for each of DURATIONS at each of RATES, and compare averages of nine lengths."""
    study = Study(folder, port=port)
    options = ("--snapshot", "1Ki")
    runs = {
        (rate, duration): study.train(f"{rate:g}-{duration}", "--lr", rate, "--duration", duration, *options)
        for duration, rate in product(durations, rates)
    }
    print("\nimages   rate  " + "".join(f"{length:9.2f} " for length in LENGTHS))
    for (rate, duration), run in runs.items():
        losses = study.losses(run, LENGTHS)
        marked = "".join(f"{loss:9.4f}{'*' if loss == min(losses) else ' '}" for loss in losses)
        print(f"{duration:6}  {rate:5g}  {marked}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
