"""python -m backends.mlx.train: train EDM2 with MLX on a Mac's GPU, or on a CPU; digits in minutes by default.

Several processes, on one Mac or more: mlx.launch -n 2 -- python -m backends.mlx.train ... Each batch is divided among
them.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backends.pipeline.runs.exit_codes import command
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import TrainOptions, count_text, parse
from backends.pipeline.runs.training import run_training
from edm2_core.presets import Ki

PROG = "python -m backends.mlx.train"
# What minutes on MLX's slow CPU build are enough for: more steps of fewer images than the preset's
SMALLER: dict[str, Any] = {"duration": 6 * Ki, "batch": 32, "rampup": Ki, "snapshot": Ki}


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(TrainOptions, argv, prog=PROG, description="Train EDM2 with MLX; with no argument, on digits.")
    from . import device  # MLX takes a moment to import: help and wrong flags do without it
    from .port import Port
    from .trainer import MLXTrainer

    port = Port(device=options.device)
    if device.is_slow(device.choose(options.device)) and _asks_for_defaults(options):
        options = replace(options, **SMALLER)
        said = ", ".join(f"--{name} {count_text(value)}" for name, value in SMALLER.items())
        print(f"smaller  for MLX on a CPU is slow here: {said}")
    status = run_training(options, MLXTrainer, port.sampler, prog=PROG)
    device.report(options.device)
    return status


def _asks_for_defaults(options: TrainOptions) -> bool:
    """Whether this starts a run on digits whose size was left to us."""
    left = all(getattr(options, name) is None for name in SMALLER)
    digits = options.data in (None, "digits") and options.preset in (None, "digits")
    return left and digits and (options.outdir is None or not Run(options.outdir).exists())


if __name__ == "__main__":
    sys.exit(main())
