"""The training loop of every port: batches, learning rate, log, snapshots, states, signals and printed messages.

Order of an iteration: learning rate, batch, step; then, whenever a multiple of its interval was crossed, the log line,
the averages and the state. The result depends only on the config: stopping and resuming do not change it.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.checkpoints.states import load_state, save_state
from backends.pipeline.data.batches import Batches, Reading
from backends.pipeline.data.datasets import Dataset, held_out
from backends.ports import Machine, OpenSampler
from backends.trainer import OpenTrainer, Trainer
from edm2_core.ema import Length, TimedPlan
from edm2_core.errors import InputError
from edm2_core.ladder import LADDER
from edm2_core.network import NetworkConfig, multiply_adds, parameter_count
from edm2_core.presets import AUTO
from edm2_core.schedule import learning_rate
from edm2_core.state import Arrays

from . import telemetry
from .command_line import count_text
from .config import DataSummary, TrainConfig
from .exit_codes import Interrupts
from .folder import Run, create
from .holdout import HeldOut, Overfitting
from .initial import Initial, initial
from .length_picture import draw_lengths
from .options import TrainOptions
from .progress import Progress
from .resolve import microbatches, open_data, resolve, with_free_options

_MANY_EPOCHS = 10_000  # the paper's longest run on ImageNet has 1757


def run_training(options: TrainOptions, open_trainer: OpenTrainer, open_sampler: OpenSampler, *, prog: str) -> int:
    """The train command: start a run, or resume the one in ``options.outdir``. Returns the exit status.

    Raises:
        InputError: as :func:`~.resolve.resolve`; a damaged state; or a failed write.
    """
    previous = options.previous
    dataset = open_data(options, previous)
    config = resolve(options, dataset, previous)
    run = None if options.outdir is None else Run(options.outdir)
    start = _start(run, previous) if run is not None and previous is not None else 0
    if options.dry_run:
        place = run.path if run is not None else "a new folder under runs/"
        print(f"{config.to_json()}{_ladder_text(config.network)}")
        _say_epochs(config)
        print(f"would train from {start} to {config.hyper.duration} images in {place}")
        return 0
    if run is not None and start >= config.hyper.duration:
        print(f"complete {run.path} at {start} images; give a longer --duration to continue it")
        if options.no_picture or (run.samples_path / "lengths.png").exists():
            return 0
        state = load_state(run.state_path, config.network, config.hyper.lengths)
        return _draw(run, config, dataset, state.params, open_sampler, nimg=start, prog=prog)
    trainer, picture = open_trainer(config, options.machine), not options.no_picture
    job = Training(config, dataset, trainer, options.machine.workers)
    return _train(job, open_sampler, options.outdir, start=start, picture=picture, prog=prog)[1]


def train(
    config: TrainConfig,
    dataset: Dataset,
    open_trainer: OpenTrainer,
    open_sampler: OpenSampler,
    *,
    outdir: str | Path | None = None,
    machine: Machine = Machine(),
    picture: bool = True,
    prog: str,
) -> Run | None:
    """Train ``config`` on ``dataset``. Returns the run; None in processes other than the first.

    Args:
        outdir: the run folder; a run that stopped in it is resumed. None: a new numbered folder under runs/.
        picture: draw averages of several lengths at the end.
        prog: the train command, for messages that suggest the next one.

    Raises:
        InputError: the folder holds a run of another config or a damaged state, or cannot be written.
        KeyboardInterrupt: after SIGINT or SIGTERM; the state was saved, and the same call continues from it.
    """
    config = replace(config, data_summary=DataSummary.of(dataset)).intervals_filled()
    run = None if outdir is None else Run(outdir)
    previous = run.config() if run is not None and run.exists() else None
    if previous is not None and config.to_json() != with_free_options(previous, config).to_json():
        raise InputError(f"a run must be resumed with its own config, got another for {outdir}: choose another outdir")
    start = _start(run, previous) if run is not None and previous is not None else 0
    if run is not None and start >= config.hyper.duration:
        return run
    trainer = open_trainer(config, machine)
    folder = None if run is None else run.path
    job = Training(config, dataset, trainer, machine.workers)
    finished, status = _train(job, open_sampler, folder, start=start, picture=picture, prog=prog)
    if status:
        raise KeyboardInterrupt
    return finished


def _start(run: Run, previous: TrainConfig) -> int:
    """Images seen by the stored state. Raises InputError if the log shows that a state was stored and it is missing."""
    last = max((record["nimg"] for record in run.log()), default=0)
    if not run.state_path.exists() and last > (previous.checkpoint or 0) + previous.hyper.batch:
        raise InputError(
            f"a run must have its state to be resumed after {last} images, got none at {run.state_path}: "
            "restore it, or choose another --outdir"
        )
    return run.state_nimg()


@dataclass(frozen=True)
class Training:
    """What is trained, on what, by what; and how many processes read the data."""

    config: TrainConfig
    dataset: Dataset
    trainer: Trainer
    workers: int = 0


def _train(
    job: Training,
    open_sampler: OpenSampler,
    outdir: Path | None,
    *,
    start: int,
    picture: bool,
    prog: str,
) -> tuple[Run | None, int]:
    """The run, None in processes that do not write, and the exit status."""
    config, dataset, trainer = job.config, job.dataset, job.trainer
    microbatches(config.hyper.batch, None, world=trainer.world)
    if outdir is not None and start:
        trainer.load_state(load_state(Run(outdir).state_path, config.network, config.hyper.lengths))
    begin = initial(config) if config.init is not None and not start else None
    if begin is not None:
        trainer.load_state(begin.state(config))
    if trainer.rank != 0:
        if not (status := _loop(job, None)) and picture:
            trainer.parameters()  # gathered in every process, for the picture
        return None, status
    resumed = outdir is not None and Run(outdir).exists()
    run = Run(create(outdir, dataset.name))
    run.save_config(config)
    _say_begin(run, config, trainer, resumed=resumed)
    if begin is not None:
        _say_initial(config, begin)
    if status := _loop(job, run):
        print(f"stopped; state saved in {run.state_path}; to resume: {prog} --outdir {run.path}")
        return run, status
    if not picture:
        _say_next(run, config, prog=prog)
        return run, 0
    return run, _draw(run, config, dataset, trainer.parameters(), open_sampler, nimg=trainer.nimg, prog=prog)


def _draw(
    run: Run, config: TrainConfig, dataset: Dataset, raw: Arrays, open_sampler: OpenSampler, *, nimg: int, prog: str
) -> int:
    """Draw the picture at the end of a run. Returns the exit status: 130 if it was interrupted, which loses nothing."""
    try:
        drawn = draw_lengths(run, config, dataset, raw, open_sampler, nimg=nimg)
    except KeyboardInterrupt:
        print(f"stopped; the run is complete and stored; to draw the picture: {prog} --outdir {run.path}")
        return 128 + SIGINT
    if drawn is not None:
        print(f"picture  {drawn.path}: the raw weights, then averages from short to long")
        print("error    of denoising: " + ", ".join(f"{name} {error:.4f}" for name, error in drawn.errors.items()))
        print(f"         on {drawn.measured_on}: not a verdict on samples")
    _say_next(run, config, prog=prog)
    return 0


def _loop(job: Training, run: Run | None) -> int:
    """Train to the end; write to ``run`` unless it is None. Returns 0, or the exit status after a signal."""
    config, trainer, hyper = job.config, job.trainer, job.config.hyper
    kept, held = held_out(job.dataset, config.holdout, seed=config.seed)
    with (
        Interrupts() as interrupts,
        _batches(job, kept) as batches,
        Progress(total=hyper.duration, start=trainer.nimg, shown=run is not None) as progress,
    ):
        report = _Report(run, progress, trainer.nimg, None if held is None else HeldOut(config, held, trainer))
        snapshots = _Snapshots(config, run)
        while trainer.nimg < hyper.duration:
            before, lr = trainer.nimg, _learning_rate(config, trainer.nimg)
            batch = next(batches)
            if config.telemetry and before // hyper.batch % config.telemetry == 0:
                measurement = trainer.measured_step(batch, lr=lr)
                if run is not None:
                    run.append_telemetry(telemetry.record(config, measurement, nimg=before))
            else:
                trainer.step(batch, lr=lr)
            nimg = trainer.nimg
            progress.advance(nimg - before)
            stop = trainer.agree(interrupts.signum is not None)
            end = nimg >= hyper.duration
            if stop or end or _crossed(config.status, before, nimg):
                report(trainer.metrics(), nimg, lr)
            snapshots.store_due(trainer, before, nimg, end=end)
            if stop or end or _crossed(config.checkpoint, before, nimg):
                _save_state(run, trainer)
            if stop:
                return interrupts.status or 128 + SIGTERM  # another process may have received the signal
    return 0


def _batches(job: Training, dataset: Dataset) -> Batches[Any]:
    """This process's share of each batch, on its device."""
    config, trainer = job.config, job.trainer
    network, share = config.network, config.hyper.batch // trainer.world
    reading = Reading(
        dataset, config.seed, label_dropout=network.label_dropout, labelled=network.label_dim > 0, flip=config.flip
    )
    return Batches(
        reading,
        start=trainer.nimg,
        batch=config.hyper.batch,
        offset=trainer.rank * share,
        count=share,
        workers=job.workers,
        place=trainer.place,
    )


def _crossed(interval: int | None, before: int, now: int) -> bool:
    return interval is not None and before // interval < now // interval


def _learning_rate(config: TrainConfig, nimg: int) -> float:
    hyper = config.hyper
    return learning_rate(nimg, batch=hyper.batch, ref_lr=hyper.lr, ref_batches=hyper.decay, rampup_nimg=hyper.rampup)


def _save_state(run: Run | None, trainer: Trainer) -> None:
    state = trainer.state()  # in every process: they gather it together
    if run is not None:
        save_state(run.state_path, state)


class _Snapshots:
    """Stores averages when they are due, and deletes those that the snapshot plan no longer keeps."""

    def __init__(self, config: TrainConfig, run: Run | None) -> None:
        self._config, self._run, self._plan = config, run, config.snapshot_plan
        sources = run.snapshots(config.network) if run is not None and self._plan is not None else []
        self._stored = {source.path: (source.time, source.length.value) for source in sources}

    def store_due(self, trainer: Trainer, before: int, now: int, *, end: bool) -> None:
        for length in self._due(before, now, end=end):
            average = trainer.average(length)  # in every process: they gather it together
            if self._run is not None:
                config = self._config
                snapshot = Snapshot(params=average, config=config.network, nimg=now, length=length, data=config.format)
                path = self._run.snapshots_path / snapshot_name(now, length)
                save_snapshot(path, snapshot, dtype=config.snapshot_dtype)
                self._stored[path] = (now, length.value)  # names count thousands of images: one may come again
        if self._run is not None and self._plan is not None:
            stale = set(self._plan.stale(self._stored.values()))
            for path in [path for path, stored in self._stored.items() if stored in stale]:
                path.unlink(missing_ok=True)
                del self._stored[path]

    def _due(self, before: int, now: int, *, end: bool) -> tuple[Length, ...]:
        if self._plan is not None:
            return tuple(map(Length.of, self._plan.due(before, now, end=end)))
        hyper = self._config.hyper
        return hyper.lengths if end or _crossed(hyper.snapshot, before, now) else ()


class _Report:
    """Each call writes a log line and shows the loss. Log lines after ``nimg`` are dropped at construction."""

    def __init__(self, run: Run | None, progress: Progress, nimg: int, held: HeldOut | None) -> None:
        self._held, self._overfitting = held, Overfitting(progress.say)
        kept = run.truncate_logs(nimg) if run is not None else []
        self._run, self._progress, self._nimg = run, progress, nimg
        self._before = kept[-1]["seconds"] if kept else 0.0  # seconds of training before this start
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
        said = f"loss {metrics['loss']:.4f}"
        if self._held is not None:
            record |= self._held.measure()
            said += f", held out {record['holdout']:.4f}"
        self._nimg, self._last = nimg, time.monotonic()
        if self._run is not None:
            self._run.append_log(record)
            self._progress.report(said)
            if self._held is not None:
                self._overfitting(record["holdout"], nimg)


# ---- printed messages


def _say_begin(run: Run, config: TrainConfig, trainer: Trainer, *, resumed: bool) -> None:
    network, hyper, data = config.network, config.hyper, config.data_summary
    cost = f"{parameter_count(network) / 1e6:.2f} M parameters, {2 * multiply_adds(network) / 1e9:.3g} GFLOP per image"
    count = f"{data.count} images" if data is not None else "images"
    size = f"{network.image_size[1]}x{network.image_size[0]}x{network.img_channels}"
    print(f"device   {trainer.device}" + (f", {trainer.world} processes" if trainer.world > 1 else ""))
    print(f"network  {config.preset}, {_ladder_text(network)}: {cost}, {config.precision}")
    if config.preset == AUTO:
        print(f"auto     what no option names, such as --channels or --duration, is chosen for {count}")
    print(f"data     {config.data}: {count} of {size}, {_labels_text(config)}")
    if network.cond_channels:
        print(f"         each with a condition of {network.cond_channels} channels from {config.condition}")
    if config.holdout:
        print(f"         {config.holdout:.3g} of them held out: the loss on these is logged")
    print(f"run      {run.path}: {count_text(hyper.duration)} images in batches of {hyper.batch}")
    _say_epochs(config)
    if trainer.nimg:
        print(f"resumed  {run.state_path} at {trainer.nimg} images")
    elif resumed:
        print("resumed  at 0 images, because no state was stored yet")
    sys.stdout.flush()  # before the progress on stderr


def _say_initial(config: TrainConfig, begin: Initial) -> None:
    taken = len(begin.params) - len(begin.fresh)
    print(f"start    {taken} of {len(begin.params)} arrays from {config.init}")
    for what, names in (("fresh", begin.fresh), ("unused", begin.unused)):
        if names:
            print(f"         {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    sys.stdout.flush()


def _labels_text(config: TrainConfig) -> str:
    dim, summary = config.network.label_dim, config.data_summary
    if not dim:
        return "no labels"
    if summary is not None and summary.vectors:
        return f"label vectors of length {dim}"
    names = config.format.classes
    shown = f" ({', '.join(names[:3])}{', ...' if dim > 3 else ''})" if names and names[0] != "0" else ""
    return f"{dim} classes{shown}"


def _say_epochs(config: TrainConfig) -> None:
    if config.data_summary is None:
        return
    epochs = config.hyper.duration / config.data_summary.count
    print(f"epochs   {epochs:,.1f}" if epochs < 100 else f"epochs   {epochs:,.0f}")
    if epochs > _MANY_EPOCHS:
        print(f"note     {epochs:,.0f} epochs are far more than any data needs: choose a shorter --duration")


def _ladder_text(network: NetworkConfig) -> str:
    """The rung, and the switches that differ from it."""
    rung, switches = vars(LADDER[network.ladder]), vars(network.switches)
    differ = [f"{name} {switches[name]}" for name in rung if switches[name] != rung[name]]
    return f"CONFIG {network.ladder}" + (f" with {', '.join(differ)}" if differ else "")


def _say_next(run: Run, config: TrainConfig, *, prog: str) -> None:
    sample = f"{prog.removesuffix('train')}sample --run {run.path}"
    print("next, for example:")
    other = any(length.relative for length in config.hyper.lengths)  # a half-life alone reconstructs few lengths
    print(f"  {sample} --sigma-rel 0.15" if other else f"  {sample}")
    if config.network.label_dim and not (config.data_summary and config.data_summary.vectors):
        print(f"  {sample} --class 3" + " --guidance 2" * (config.network.label_dropout > 0))
    if not isinstance(config.snapshot_plan, TimedPlan):  # a timed plan ends with its run
        print(f"  {prog} --outdir {run.path} --duration {count_text(2 * config.hyper.duration)}")
