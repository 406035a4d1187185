"""python -m backends.jax.sample: images from a trained network, of any averaging length, with any guide."""

import sys
from collections.abc import Sequence

from backends.pipeline.commands import command
from backends.pipeline.options import SampleOptions, parse
from backends.pipeline.sampling import run_sampling

PROG = "python -m backends.jax.sample"


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(SampleOptions, argv, prog=PROG, description="Sample with JAX; by default, the newest run.")
    from . import device  # JAX takes a second to import: help and wrong flags do without it
    from .port import Port

    port = Port(device=device.choose(options.device)[0], precision=options.precision or "float32")
    run_sampling(options, port.sampler, prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
