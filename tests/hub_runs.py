"""What tests of the hub publish, and where."""

from toy_port import CONFIG, train_toy

from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot
from edm2_core.ema import Length
from edm2_core.network import initialize

ADDRESS = "hf://ada/digits"


def make_run():
    """A run with eight snapshots, at four times."""
    _, _, run = train_toy("run", duration=4096, no_picture=True)
    return run


def snapshot(path, length=0.1, config=CONFIG, seed=1):
    """The parameters of a snapshot that is written to ``path``."""
    params = initialize(config, seed=seed)
    save_snapshot(path, Snapshot(params=params, config=config, nimg=2048, length=Length.of(length)))
    return load_snapshot(path).params
