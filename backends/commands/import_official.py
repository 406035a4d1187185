"""edm2 import: an official EDM2 pickle becomes a snapshot; nothing in it is executed."""

from dataclasses import dataclass

from backends.pipeline.checkpoints.official import LICENCE, read_official
from backends.pipeline.checkpoints.snapshots import save_snapshot, snapshot_name
from backends.pipeline.runs.options import Given, Images, Location, Number
from edm2_core.errors import InputError
from edm2_core.network import parameter_count


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the import command was asked for."""

    source: Given
    """The pickle, such as edm2-img512-s-2147483-0.130.pkl."""
    out: Location = None
    """Snapshot to write. Default: beside the pickle, named by its time and length."""
    nimg: Images = None
    """Images seen in training. Default: what the pickle's name says."""
    sigma_rel: Number = None
    """Relative length of the average. Default: what the pickle's name says."""


def run(options: Options) -> None:
    """Read the pickle, write the snapshot, and say under what licence the weights are.

    Raises:
        InputError: as :func:`~backends.pipeline.checkpoints.official.read_official`, or the snapshot is there already.
    """
    snapshot = read_official(options.source, nimg=options.nimg, sigma_rel=options.sigma_rel)
    path = options.out or options.source.with_name(snapshot_name(snapshot.nimg, snapshot.sigma_rel or 0))
    if path.exists():
        raise InputError(f"a snapshot must not take another file's place, got {path}: choose another --out")
    save_snapshot(path, snapshot)
    size = f"{parameter_count(snapshot.network) / 1e6:.1f} M parameters"
    print(f"network   {size}, sigma_rel {snapshot.sigma_rel:g}, after {snapshot.nimg} images")
    print(f"wrote     {path}")
    print(f"licence   {LICENCE}")
