"""python -m backends.torch.train: train EDM2 with PyTorch on CUDA, MPS or CPU; digits in two minutes by default.

Several GPUs: torchrun --nproc-per-node=8 -m backends.torch.train ... Each batch is divided among the processes.
"""

from collections.abc import Sequence

from backends.pipeline.runs.exit_codes import command, leave

PROG = "python -m backends.torch.train"


@command
def main(argv: Sequence[str] | None = None) -> int:
    from backends.pipeline.runs.options import parse_train, with_precision  # needs packages that a plain install lacks

    options = parse_train(argv, prog=PROG, description="Train EDM2 with PyTorch; with no argument, on digits.")
    from backends.pipeline.runs.precision import say_if_slow
    from backends.pipeline.runs.training import run_training

    from . import device  # PyTorch takes seconds to import: help and wrong flags do without it
    from .port import Port
    from .trainer import TorchTrainer

    place = device.choose(options.machine.device)
    options = with_precision(options, argv, device.fastest_precision(place))
    team = device.Processes.here().team(place)
    port = Port(device=str(place))
    say_if_slow(port, options.config.precision)
    return run_training(options, TorchTrainer, port.sampler, prog=PROG, team=team, room=device.room(place))


if __name__ == "__main__":
    leave(main())
