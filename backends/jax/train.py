"""python -m backends.jax.train: train EDM2 with JAX on TPU, GPU or CPU; on digits with no argument.

All devices of a host share each batch. Several hosts: start the command on each, with JAX_COORDINATOR_ADDRESS set to
the first one's address and port, JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0 on.
"""

import sys
from collections.abc import Sequence

from backends.pipeline.runs.exit_codes import command

PROG = "python -m backends.jax.train"


@command
def main(argv: Sequence[str] | None = None) -> int:
    from backends.pipeline.runs.options import parse_train, with_precision  # needs packages that a plain install lacks

    options = parse_train(argv, prog=PROG, description="Train EDM2 with JAX; with no argument, on digits.")
    from backends.pipeline.runs.precision import say_if_slow
    from backends.pipeline.runs.training import run_training

    from . import device  # JAX takes a second to import: help and wrong flags do without it
    from .port import Port
    from .trainer import JaxTrainer

    device.join()
    place = device.choose_one(options.machine.device)
    options = with_precision(options, argv, device.fastest_precision(place))
    team = device.team()
    port = Port(device=place)
    say_if_slow(port, options.config.precision)
    return run_training(
        options, JaxTrainer, port.sampler, prog=PROG, team=team, room=device.room(options.machine.device)
    )


if __name__ == "__main__":
    sys.exit(main())
