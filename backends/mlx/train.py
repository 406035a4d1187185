"""python -m backends.mlx.train: train EDM2 with MLX on a Mac's GPU, or on a CPU; digits in minutes by default.

Several processes, on one Mac or more: mlx.launch -n 2 -- python -m backends.mlx.train ... Each batch is divided among
them.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backends.pipeline.runs.exit_codes import command
from edm2_core.presets import Ki

if TYPE_CHECKING:
    from backends.pipeline.runs.options import TrainOptions

PROG = "python -m backends.mlx.train"
# Enough for minutes on MLX's slow CPU build: more steps of fewer images than the preset's
SMALLER: dict[str, Any] = {"duration": 6 * Ki, "batch": 32, "rampup": Ki, "snapshot": Ki}


@command
def main(argv: Sequence[str] | None = None) -> int:
    from backends.pipeline.runs.command_line import count_text  # needs packages that a plain install lacks
    from backends.pipeline.runs.options import parse_train

    options = parse_train(argv, prog=PROG, description="Train EDM2 with MLX; with no argument, on digits.")
    from backends.pipeline.runs.precision import say_if_slow
    from backends.pipeline.runs.training import run_training

    from . import device  # MLX takes a moment to import: help and wrong flags do without it
    from .port import Port
    from .trainer import MLXTrainer

    where = options.machine.device
    team = device.Processes.here().team()
    port = Port(device=where)
    if device.is_slow(device.choose(where)) and _asks_for_defaults(options, sys.argv[1:] if argv is None else argv):
        options = replace(options, config=replace(options.config, hyper=replace(options.config.hyper, **SMALLER)))
        said = ", ".join(f"--{name} {count_text(value)}" for name, value in SMALLER.items())
        print(f"smaller  for MLX on a CPU is slow here: {said}")
    say_if_slow(port, options.config.precision)
    status = run_training(options, MLXTrainer, port.sampler, prog=PROG, team=team, room=device.room())
    device.report(where)
    return status


def _asks_for_defaults(options: "TrainOptions", words: Sequence[str]) -> bool:
    """Whether this starts a run on digits whose size was left to us."""
    from backends.pipeline.runs.command_line import flags_given

    digits = options.data in (None, "digits") and options.preset == "digits"
    return digits and options.previous is None and not flags_given(words) & SMALLER.keys()


if __name__ == "__main__":
    sys.exit(main())
