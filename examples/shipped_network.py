"""Makes the network that ships with edm2: the default run on digits, its average of length 0.10.

    python -m examples.shipped_network

It takes the two to three minutes of that run and replaces the snapshot beside backends/pipeline/runs/shipped.py, which
the sample commands use where there is no run.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.resolve import configure
from backends.pipeline.runs.shipped import PATH
from backends.torch import api
from edm2_core.ema import Length


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this example."""

    out: Path = PATH
    """Where to write the snapshot."""
    duration: int | None = None
    """Images to train on. Without it: the preset's."""


def main(options: Options) -> None:
    digits = open_dataset("digits")
    changes: dict[str, Any] = {} if options.duration is None else {"duration": options.duration}
    with TemporaryDirectory() as folder:
        run = api.train(configure(digits, **changes), digits, outdir=folder, picture=False)
        assert run is not None, "this is the only process"
        last = [s for s in run.snapshots(run.config().network) if s.length == Length.of(0.10)][-1]
        shutil.copyfile(last.path, options.out)
    print(f"wrote    {options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Options))
