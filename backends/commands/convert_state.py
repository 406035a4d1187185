"""edm2 convert-state: a run's training state as a checkpoint of another engine, and such a checkpoint as a run's state.

PyTorch's distributed checkpoints (DCP) and orbax: what lies where in them is said in
:mod:`backends.pipeline.checkpoints.engines`.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from backends.pipeline.checkpoints import states
from backends.pipeline.checkpoints.engines import Checkpoint, Engine, open_checkpoint, recognised, write_checkpoint
from backends.pipeline.runs.agreement import stored_state
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run, create
from backends.pipeline.runs.writer import writing
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 convert-state``."""

    source: tyro.conf.Positional[Path]
    """A run, whose last state becomes a checkpoint; or a checkpoint, which is recognised."""
    dest: tyro.conf.Positional[Path]
    """A folder that does not exist yet; or the run whose state a checkpoint becomes, which is made if the checkpoint
    holds the config of one."""
    to: Engine = "dcp"
    """The engine of the checkpoint that is written."""
    nimg: int | None = None
    """Images seen. Without it: what the checkpoint says."""
    missing_fresh: bool = False
    """Where a checkpoint has no averages, or no moments of Adam: begin them anew, from the weights, and from 0."""


def run(options: Options) -> None:
    """Convert, and say what was written and how to go on.

    Raises:
        InputError: neither run nor checkpoint; a damaged or incomplete one; a destination that exists, or that holds a
            later state; a package that is missing.
    """
    if recognised(options.source) is None:
        _from_run(Run(options.source), options)
    else:
        _into_run(open_checkpoint(options.source), Run(options.dest), options)


def _from_run(run: Run, options: Options) -> None:
    config = run.config()
    state = stored_state(run, config)
    write_checkpoint(options.dest, options.to, state, config=config.to_json())
    print(f"state     of {run.path} after {state.nimg} images")
    print(f"wrote     {options.dest}, for {options.to}")


def _into_run(checkpoint: Checkpoint, run: Run, options: Options) -> None:
    config = _config(checkpoint, run)
    nimg = checkpoint.number("nimg") if options.nimg is None else options.nimg
    if nimg is None:
        raise InputError(f"{checkpoint.path} must say how many images were seen, got no number: give --nimg")
    if nimg <= run.state_nimg():
        raise InputError(
            f"the state must be later than that of the run, after {run.state_nimg()} images, got one after {nimg}: "
            "choose another run, or remove its state"
        )
    steps = checkpoint.steps(config.network)
    state, others = checkpoint.state(
        config.network,
        config.hyper.lengths,
        nimg=nimg,
        steps=nimg // config.hyper.batch if steps is None else steps,
        missing_fresh=options.missing_fresh,
    )
    with writing(create(run.path, run.path.name)):
        if not run.exists():
            run.save_config(config)
        path = states.store(run.states_path, state)
    if others:
        print(f"left out  {len(others)} arrays that are no part of a state, such as {min(others)}")
    print(f"wrote     {path}, after {nimg} images and {state.steps} steps")
    print(f"go on     with --outdir {run.path}")


def _config(checkpoint: Checkpoint, run: Run) -> TrainConfig:
    if run.exists():
        return run.config()
    text = checkpoint.config()
    if text is None:
        raise InputError(
            f"a checkpoint without a run's config must become the state of a run, got no run in {run.path}: start one "
            "of the same network, and stop it"
        )
    return TrainConfig.from_json(text, name=f"the config in {checkpoint.path}")
