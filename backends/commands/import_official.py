"""edm2 import: converts an official EDM2 pickle to a snapshot without executing anything in it."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from backends.pipeline.checkpoints.official import LICENCE, read_official
from backends.pipeline.checkpoints.snapshots import save_snapshot
from edm2_core.errors import InputError
from edm2_core.network import parameter_count


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 import``."""

    source: tyro.conf.Positional[Path]
    """The pickle, such as edm2-img512-s-2147483-0.130.pkl."""
    out: Path | None = None
    """Snapshot to write. Without it: beside the pickle, under its name."""
    nimg: int | None = None
    """Images seen in training. Without it: taken from the pickle's name."""
    sigma_rel: float | None = None
    """Relative length of the average. Without it: taken from the pickle's name."""


def run(options: Options) -> None:
    """Read the pickle, write the snapshot, and print the licence of the weights.

    Raises:
        InputError: as :func:`~backends.pipeline.checkpoints.official.read_official`, or the output exists.
    """
    snapshot = read_official(options.source, nimg=options.nimg, sigma_rel=options.sigma_rel)
    assert snapshot.length is not None, "official files are averages"
    path = options.out or options.source.with_suffix(".safetensors")
    if path.exists():
        raise InputError(f"--out must be a new file, got {path}, which exists: choose another")
    save_snapshot(path, snapshot)
    size = f"{parameter_count(snapshot.required_config()) / 1e6:.1f} M parameters"
    print(f"network   {size}, sigma_rel {snapshot.length}, after {snapshot.nimg} images")
    print(f"wrote     {path}")
    print(f"licence   {LICENCE}")
