"""python -m backends.torch.sample: images from a trained network, of any averaging length, with any guide."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from backends.pipeline.runs.exit_codes import command, leave

if TYPE_CHECKING:
    import numpy as np

    from backends.pipeline.runs.options import SamplingOptions
    from backends.pipeline.runs.team import Team
    from backends.ports import OpenSampler

PROG = "python -m backends.torch.sample"


@command
def main(argv: Sequence[str] | None = None) -> None:
    from backends.pipeline.runs.command_line import parse  # needs packages that a plain install lacks
    from backends.pipeline.runs.options import SampleOptions
    from backends.pipeline.runs.sampling import run_sampling

    options = parse(SampleOptions, argv, prog=PROG, description="Sample with PyTorch; by default, the newest run.")
    team = open_team(options.device)
    run_sampling(options, open_sampler(options), prog=PROG, open_decoder=open_decoder, team=team)


def open_decoder(name: str, device: str | None, only_local: bool) -> "Callable[[np.ndarray], np.ndarray]":
    """See :func:`.vae.open_decoder`, which is imported where latents are decoded."""
    from . import vae

    return vae.open_decoder(name, device, only_local)


def open_team(device: str | None) -> "Team":
    """The processes that share the images."""
    from . import device as devices

    return devices.Processes.here().team(devices.choose(device))


def open_sampler(options: "SamplingOptions") -> "OpenSampler":
    """On the device and in the precision that ``options`` name."""
    from backends.pipeline.runs.precision import say_if_slow

    from . import device  # PyTorch takes seconds to import: help and wrong flags do without it
    from .compiling import compile_mode
    from .port import Port

    place = device.choose(options.device)
    mode = compile_mode(options.compile, place) if options.compile in ("max", "blocks") else None
    graphs = place.type == "cuda" and options.compile != "off"
    port = Port(
        device=str(place), precision=options.precision, mode=mode, by_block=options.compile == "blocks", graphs=graphs
    )
    say_if_slow(port, options.precision)
    return port.sampler


if __name__ == "__main__":
    leave(main())
