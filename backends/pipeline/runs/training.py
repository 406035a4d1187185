"""What surrounds the training steps, whichever port takes them?

Order of a step: learning rate, batch, step; then, where a multiple of its interval was crossed, a line of log, the
averages, the state. A run is a function of its settings alone: stopped anywhere and resumed, it ends the same.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGTERM
from typing import Protocol

import numpy as np

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.checkpoints.states import State, load_state, save_state
from backends.pipeline.data.batches import Batches
from backends.pipeline.data.datasets import Dataset, open_dataset
from edm2_core.ema import HalfLife, TimedPlan
from edm2_core.errors import InputError
from edm2_core.ladder import LADDER
from edm2_core.network import NetworkConfig, multiply_adds, parameter_count
from edm2_core.schedule import learning_rate

from . import telemetry
from .config import Settings, data_spec, microbatches, resolve
from .exit_codes import Interrupts
from .folder import Run, create
from .length_picture import draw_lengths
from .options import TrainOptions, count_text
from .progress import Progress
from .sampling import OpenSampler
from .telemetry import Measurement


class Trainer(Protocol):
    """What a port brings: a network in training, in one of ``world`` processes. All processes make the same calls."""

    rank: int
    world: int
    device: str

    def step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> None:
        """Train on this process's share of a batch, float32 NCHW and one-hot, after ``nimg`` images."""

    def measured_step(self, images: np.ndarray, labels: np.ndarray | None, /, *, nimg: int, lr: float) -> Measurement:
        """:meth:`step`, and what it is made of. Training goes on exactly as without."""

    def metrics(self) -> Mapping[str, float]:
        """``loss``, the mean since the last call, and ``nonfinite``, the number of gradients zeroed since."""

    def parameters(self) -> Mapping[str, np.ndarray]: ...

    def averages(self) -> Mapping[float, Mapping[str, np.ndarray]]: ...

    def state(self) -> State: ...

    def load_state(self, state: State, /) -> None: ...

    def agree(self, stop: bool, /) -> bool:
        """Whether any process wants to stop."""


OpenTrainer = Callable[[Settings, TrainOptions], Trainer]


def run_training(options: TrainOptions, open_trainer: OpenTrainer, open_sampler: OpenSampler, *, prog: str) -> int:
    """Train as ``options`` ask, in a fresh run folder or on from where one stopped. Returns the exit status.

    Raises:
        InputError: see :func:`~.config.resolve`; a damaged state; or nowhere to write.
    """
    run = None if options.outdir is None else Run(options.outdir)
    previous = run.settings() if run is not None and run.exists() else None
    dataset = open_dataset(data_spec(options, previous))
    settings = resolve(options, dataset, previous)
    start = 0 if run is None or previous is None else _start(run, previous)
    if options.dry_run:
        place = run.path if run is not None else "a fresh folder under runs/"
        print(f"{settings.to_json()}{_ladder_text(settings.network)}")
        print(f"would train from {start} to {settings.duration} images in {place}")
        return 0
    if run is not None and start >= settings.duration:
        _complete(run, settings, dataset, start, open_sampler, prog=prog)
        return 0
    trainer = open_trainer(settings, options)
    microbatches(settings.batch, options.batch_per_device, world=trainer.world)
    if run is not None and start:
        trainer.load_state(load_state(run.state_path, settings.network, settings.lengths))
    if trainer.rank != 0:
        return _loop(settings, dataset, trainer, start, None)
    run = Run(create(options.outdir, dataset.name))
    run.save_settings(settings)
    _say_begin(run, settings, trainer, start, resumed=previous is not None)
    if status := _loop(settings, dataset, trainer, start, run):
        print(f"stopped; state saved in {run.state_path}; to resume: {prog} --outdir {run.path}")
        return status
    drawn = draw_lengths(run, dataset, trainer.parameters(), open_sampler, nimg=run.state_nimg())
    _say_end(run, settings, drawn, prog=prog)
    return 0


def _start(run: Run, previous: Settings) -> int:
    """Images seen by the stored state. Raises InputError where a state must have been stored and is gone."""
    came_to = max((record["nimg"] for record in run.log()), default=0)
    if not run.state_path.exists() and came_to > previous.checkpoint + previous.batch:
        raise InputError(
            f"a run that came to {came_to} images must have its state to go on, got none at {run.state_path}: "
            "restore it, or choose another --outdir"
        )
    return run.state_nimg()


def _loop(settings: Settings, dataset: Dataset, trainer: Trainer, nimg: int, run: Run | None) -> int:
    """Train from ``nimg`` images on; write to ``run``, if it is ours to write. Returns the status of a signal, or 0."""
    share = settings.batch // trainer.world
    part = {"offset": trainer.rank * share, "count": share}
    with (
        Interrupts() as interrupts,
        Batches(dataset, start=nimg, batch=settings.batch, seed=settings.seed, **part) as batches,
        Progress(total=settings.duration, start=nimg, shown=run is not None) as progress,
    ):
        report = _Report(settings, run, progress, nimg)
        while nimg < settings.duration:
            images, labels = next(batches)
            lr = _learning_rate(settings, nimg)
            classes = labels if settings.network.label_dim else None
            if settings.telemetry and nimg // settings.batch % settings.telemetry == 0:
                measured = trainer.measured_step(images, classes, nimg=nimg, lr=lr)
                if run is not None:
                    run.append_telemetry(telemetry.record(settings, measured, nimg=nimg))
            else:
                trainer.step(images, classes, nimg=nimg, lr=lr)
            before, nimg = nimg, nimg + settings.batch
            progress.advance(settings.batch)
            stop = trainer.agree(interrupts.signum is not None)
            end = nimg >= settings.duration
            if stop or end or _crossed(settings.status, before, nimg):
                report(trainer.metrics(), nimg, lr)
            if due := _due(settings, before, nimg, end=end):
                _save_averages(run, settings, trainer, nimg, due)
            if stop or end or _crossed(settings.checkpoint, before, nimg):
                _save_state(run, trainer)
            if stop:
                return interrupts.status or 128 + SIGTERM  # the signal may have come to another process
    return 0


def _crossed(interval: int, before: int, now: int) -> bool:
    return before // interval < now // interval


def _due(settings: Settings, before: int, now: int, *, end: bool) -> tuple[float, ...]:
    """The lengths of the averages to store now."""
    if settings.plan is not None:
        return settings.plan.due(before, now, end=end)
    return settings.lengths if end or _crossed(settings.snapshot, before, now) else ()


def _learning_rate(settings: Settings, nimg: int) -> float:
    return learning_rate(
        nimg, batch=settings.batch, ref_lr=settings.lr, ref_batches=settings.decay, rampup_nimg=settings.rampup
    )


def _save_averages(run: Run | None, settings: Settings, trainer: Trainer, nimg: int, due: tuple[float, ...]) -> None:
    averages = trainer.averages()
    if run is None:
        return
    for sigma_rel in due:
        snapshot = Snapshot(params=averages[sigma_rel], config=settings.network, nimg=nimg, sigma_rel=sigma_rel)
        save_snapshot(run.snapshots_path / snapshot_name(nimg, sigma_rel), snapshot)
    if settings.plan is not None:
        run.drop(settings.plan.stale([(stored.nimg, stored.sigma_rel) for stored in run.snapshots()]))


def _save_state(run: Run | None, trainer: Trainer) -> None:
    state = trainer.state()
    if run is not None:
        save_state(run.state_path, state)


class _Report:
    """Writes a line of log each time it is called, and says the loss. Lines after ``nimg`` are dropped first."""

    def __init__(self, settings: Settings, run: Run | None, progress: Progress, nimg: int) -> None:
        kept = run.truncate_logs(nimg) if run is not None else []
        self._run, self._progress, self._nimg = run, progress, nimg
        self._before = kept[-1]["seconds"] if kept else 0.0  # the clock goes on where the log ends
        self._start = self._last = time.monotonic()

    def __call__(self, metrics: Mapping[str, float], nimg: int, lr: float) -> None:
        now = time.monotonic()
        record = {
            "nimg": nimg,
            "loss": metrics["loss"],
            "lr": lr,
            "images_per_s": (nimg - self._nimg) / max(now - self._last, 1e-9),
            "seconds": self._before + now - self._start,
            "nonfinite": metrics["nonfinite"],
        }
        self._nimg, self._last = nimg, now
        if self._run is not None:
            self._run.append_log(record)
            self._progress.report(f"loss {metrics['loss']:.4f}")


def _say_begin(run: Run, settings: Settings, trainer: Trainer, start: int, *, resumed: bool) -> None:
    data, network = settings.data_summary, settings.network
    cost = f"{parameter_count(network) / 1e6:.2f} M parameters, {2 * multiply_adds(network) / 1e9:.3g} GFLOP per image"
    classes = f"{network.label_dim} classes" if network.label_dim else "no labels"
    size = f"{data.count} images of {data.resolution}x{data.resolution}x{data.channels}"
    print(f"device   {trainer.device}" + (f", {trainer.world} processes" if trainer.world > 1 else ""))
    print(f"network  {settings.preset}, {_ladder_text(network)}: {cost}, {settings.precision}")
    print(f"data     {settings.data}: {size}, {classes}")
    print(f"run      {run.path}: {count_text(settings.duration)} images in batches of {settings.batch}")
    if start:
        print(f"resumed  {run.state_path} at {start} images")
    elif resumed:
        print("resumed  at 0 images, for no state was stored yet")
    sys.stdout.flush()  # before the progress on stderr


def _ladder_text(network: NetworkConfig) -> str:
    """The rung, and where this network is not on it."""
    rung, own = vars(LADDER[network.ladder]), vars(network.switches)
    differ = [f"{name} {own[name]}" for name in rung if own[name] != rung[name]]
    return f"CONFIG {network.ladder}" + (f" with {', '.join(differ)}" if differ else "")


def _say_end(run: Run, settings: Settings, drawn: tuple[Path, dict[str, float]] | None, *, prog: str) -> None:
    sample = f"{prog.removesuffix('train')}sample --run {run.path}"
    if drawn is not None:
        picture, errors = drawn
        print(f"picture  {picture}: the raw weights, then averages from short to long")
        print("error    of denoising: " + ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    print("next, for instance:")
    other = not all(isinstance(length, HalfLife) for length in settings.lengths)  # those may reach no other
    print(f"  {sample} --sigma-rel 0.15" if other else f"  {sample}")
    if settings.network.label_dim:
        print(f"  {sample} --class 3 --guidance 2")
    if not isinstance(settings.plan, TimedPlan):  # which ends with its run
        print(f"  {prog} --outdir {run.path} --duration {count_text(2 * settings.duration)}")


def _complete(
    run: Run, settings: Settings, dataset: Dataset, nimg: int, open_sampler: OpenSampler, *, prog: str
) -> None:
    print(f"complete {run.path} at {nimg} images; to prolong it give a longer --duration")
    if not (run.samples_path / "lengths.png").exists():  # stopped between the last state and the picture
        state = load_state(run.state_path, settings.network, settings.lengths)
        _say_end(run, settings, draw_lengths(run, dataset, state.params, open_sampler, nimg=nimg), prog=prog)
