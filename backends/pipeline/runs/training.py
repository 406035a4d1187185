"""The training loop of every port: batches, learning rate, log, snapshots, states, signals and printed messages.

Order of an iteration: learning rate, batch, step; then, whenever a multiple of its interval was crossed, the averages,
the log line and the state. The result depends only on the config: stopping and resuming do not change it.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

from backends.pipeline.checkpoints import states
from backends.pipeline.data.batches import Batches, Reading
from backends.pipeline.data.datasets import Dataset, held_out
from backends.pipeline.data.patience import set_seconds
from backends.ports import Machine, OpenSampler
from backends.trainer import Measurement, OpenTrainer, Trainer
from edm2_core.errors import InputError
from edm2_core.network import plan
from edm2_core.presets import AUTO
from edm2_core.schedule import learning_rate
from edm2_core.state import Arrays

from . import freed_memory, telemetry
from .agreement import check_same_config, hold, load_into, resumed_by_first, stored_images, stored_state
from .config import DataSummary, TrainConfig
from .exit_codes import Interrupts
from .fitting import Room, images_at_a_time
from .folder import RUNS, Run
from .holdout import HeldOut
from .length_picture import draw_lengths
from .messages import Estimate, ladder_text, say_begin, say_epochs, say_initial, say_next
from .mirror import Mirror
from .options import ScoreOptions, TrainOptions
from .progress import Progress
from .reporting import Report
from .resolve import microbatches, open_data, resolve, with_free_options
from .safety import Divergence, Failure
from .scoring import Measured, Scores
from .snapshots_due import DueSnapshots, crossed
from .space import check_space
from .storing import Stored, same_everywhere
from .team import Team
from .trackers import Trackers, check_installed
from .writer import writing


def run_training(
    options: TrainOptions,
    open_trainer: OpenTrainer,
    open_sampler: OpenSampler,
    *,
    prog: str,
    team: Team = Team(),
    room: Room | None = None,
) -> int:
    """The train command: start a run, or resume the one in ``options.outdir``. Returns the exit status.

    ``team`` are the processes that share each batch: they train what the first one starts or resumes. ``room`` is the
    memory of the devices, by which preset auto divides a batch that would not fit.

    Raises:
        InputError: as :func:`~.resolve.resolve`; a damaged state; another writer of the run; processes that would train
            something else; or a failed write.
    """
    set_seconds(options.machine.timeout)
    options = resumed_by_first(options, team, prog=prog)
    previous = options.previous
    dataset = open_data(options, previous)
    config = resolve(options, dataset, previous)
    check_same_config(config, team)
    run = None if options.outdir is None else Run(options.outdir)
    start = stored_images(run, previous, team)
    if options.dry_run:
        place = run.path if run is not None else "a new folder under runs/"
        print(f"{config.to_json()}{ladder_text(config.network)}")
        say_epochs(config)
        print(f"disk     {check_space(config, Run(options.outdir or RUNS))}")
        print(f"would train from {start} to {config.hyper.duration} images in {place}")
        return 0
    if run is not None and start >= config.hyper.duration:
        team.say(f"complete {run.path} at {start} images; give a longer --duration to continue it")
        if team.rank == 0:
            _tidy(run, keep=config.keep)
        if team.rank > 0 or options.no_picture or (run.samples_path / "lengths.png").exists():
            return 0
        state = stored_state(run, config)
        with Trackers(options.log, run, config) as trackers:
            return _draw(run, config, dataset, state.params, open_sampler, trackers, nimg=start, prog=prog)
    machine = _machine(options.machine, config, room)
    trainer, picture = open_trainer(config, machine), not options.no_picture
    job = Training(config, dataset, trainer, machine, options.scores, options.url, options.log)
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
    log: Sequence[str] = (),
    prog: str,
) -> Run | None:
    """Train ``config`` on ``dataset``. Returns the run; None in processes other than the first.

    From then on this process keeps memory that it frees (:func:`.freed_memory.keep`).

    Args:
        outdir: the run folder; a run that stopped in it is resumed. None: a new numbered folder under runs/.
        picture: draw averages of several lengths at the end.
        log: names of experiment trackers, as of --log.
        prog: the train command, for messages that suggest the next one.

    Raises:
        InputError: the folder holds a run of another config or a damaged state, has another writer, or cannot be
            written; or another process would train something else.
        KeyboardInterrupt: after SIGINT or SIGTERM; the state was saved, and the same call continues from it.
    """
    set_seconds(machine.timeout)
    check_installed(log)
    config = replace(config, data_summary=DataSummary.of(dataset)).intervals_filled()
    run = None if outdir is None else Run(outdir)
    previous = run.config() if run is not None and run.exists() else None
    if previous is not None and config.to_json() != with_free_options(previous, config).to_json():
        raise InputError(f"a run must be resumed with its own config, got another for {outdir}: choose another outdir")
    trainer = open_trainer(config, machine)
    check_same_config(config, trainer.team)
    start = stored_images(run, previous, trainer.team)
    if run is not None and start >= config.hyper.duration:
        return run if trainer.rank == 0 else None
    folder = None if run is None else run.path
    job = Training(config, dataset, trainer, machine, log=tuple(log))
    finished, status = _train(job, open_sampler, folder, start=start, picture=picture, prog=prog)
    if status:
        raise KeyboardInterrupt
    return finished


def _tidy(run: Run, *, keep: int) -> None:
    """Remove what a process that was killed at the very end of a complete run has left."""
    with suppress(InputError), writing(run.path):  # another process may train it longer
        states.remove_others(run.states_path, keep=keep)


def _machine(machine: Machine, config: TrainConfig, room: Room | None) -> Machine:
    """``machine``, on which as many images are processed at once as fit, if that was left to preset auto."""
    if room is None or machine.batch_per_device is not None or config.preset != AUTO:
        return machine
    count = images_at_a_time(config.network, config.hyper.batch, room, precision=config.precision)
    if count is None:
        return machine
    print(
        f"memory   {count} images at a time on each device, by an estimate; --batch-per-device chooses another number"
    )
    return replace(machine, batch_per_device=count)


@dataclass(frozen=True)
class Training:
    """What is trained, on what, by what, on which machine; and what is measured meanwhile."""

    config: TrainConfig
    dataset: Dataset
    trainer: Trainer
    machine: Machine = Machine()
    scores: ScoreOptions = field(default_factory=ScoreOptions)
    url: str | None = None
    """Where the run's files are copied to."""
    log: tuple[str, ...] = ()
    """Names of the trackers that are sent what the run logs."""


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
    freed_memory.keep()
    microbatches(config.hyper.batch, None, world=trainer.world)
    with ExitStack() as held:
        resumed = outdir is not None and trainer.rank == 0 and Run(outdir).exists()
        run = hold(outdir, dataset.name, held, start=start, team=trainer.team)
        begin = load_into(trainer, config, outdir, start=start)
        if trainer.world > 1:
            same_everywhere(trainer, config)
        disk = trainer.team.first(lambda: b"" if run is None else check_space(config, run).encode())
        if run is None:
            if not (status := _loop(job, None, open_sampler, Trackers())) and picture:
                _parameters(job)  # for the first process's picture
            return None, status
        run.save_config(config)
        run.url = job.url
        mirror = None if job.url is None else held.enter_context(Mirror(run.path, job.url))
        say_begin(run, config, trainer, resumed=resumed)
        print(f"disk     {disk.decode()}")
        if job.url is not None:
            print(f"copies   of all that is written go to {job.url}")
        if begin is not None:
            say_initial(config, begin)
        trackers = held.enter_context(Trackers(job.log, run, config))
        if status := _loop(job, run, open_sampler, trackers, mirror):
            print(f"stopped; state saved in {run.state_path}; to resume: {prog} --outdir {run.address}")
            return run, status
        if not picture:
            say_next(run, config, prog=prog)
            return run, 0
        raw = _parameters(job)
        return run, _draw(run, config, dataset, raw, open_sampler, trackers, nimg=trainer.nimg, prog=prog)


def _parameters(job: Training) -> Arrays:
    """The weights, in the first process. All must call it together."""
    return job.trainer.for_first(job.trainer.parameters, plan(job.config.network).parameters)


def _draw(
    run: Run,
    config: TrainConfig,
    dataset: Dataset,
    raw: Arrays,
    open_sampler: OpenSampler,
    trackers: Trackers,
    *,
    nimg: int,
    prog: str,
) -> int:
    """Draw the picture at the end of a run, and send it. Returns the exit status: 130 if it was interrupted, which
    loses nothing."""
    try:
        drawn = draw_lengths(run, config, dataset, raw, open_sampler, nimg=nimg)
    except KeyboardInterrupt:
        print(f"stopped; the run is complete and stored; to draw the picture: {prog} --outdir {run.address}")
        return 128 + SIGINT
    if drawn is not None:
        trackers.picture(nimg, drawn.path.stem, drawn.path)
        print(f"picture  {drawn.path}: the raw weights, then averages from short to long")
        print("error    of denoising: " + ", ".join(f"{name} {error:.4f}" for name, error in drawn.errors.items()))
        print(f"         on {drawn.measured_on}: not a verdict on samples")
    say_next(run, config, prog=prog)
    return 0


def _loop(
    job: Training, run: Run | None, open_sampler: OpenSampler, trackers: Trackers, mirror: Mirror | None = None
) -> int:
    """Train to the end; write to ``run``, which ``mirror`` copies, and to ``trackers``, unless it is None. Returns 0,
    or the exit status after a signal."""
    config, trainer, hyper = job.config, job.trainer, job.config.hyper
    kept, held = held_out(job.dataset, config.holdout, seed=config.seed)
    with (
        Interrupts() as interrupts,
        _batches(job, kept) as batches,
        Progress(total=hyper.duration, start=trainer.nimg, shown=run is not None) as progress,
        Stored(run, config, trainer) as stored,
    ):
        failure = Failure()
        diverged = Divergence(trainer.nimg, hyper.batch)
        held_out_loss = None if held is None else HeldOut(config, held, trainer)
        report = Report(run, progress, trainer.nimg, held_out_loss, trackers)
        snapshots = DueSnapshots(config, run)
        scores = _scores(job, run, open_sampler, progress, trackers)
        estimate = Estimate(trainer, hyper.duration, progress.say)
        snapshots.store_missing(trainer)
        with stored.kept_at_errors():
            while trainer.nimg < hyper.duration:
                before = trainer.nimg
                with failure.kept():
                    batch = next(batches)
                    estimate(nimg=before)
                if trainer.agree(failure.error is not None or interrupts.signum is not None):
                    break
                measurement, lr = _step(job, batch)
                nimg, end = trainer.nimg, trainer.nimg >= hyper.duration
                snapshots.store_due(trainer, before, nimg, end=end)
                stores = end or crossed(config.checkpoint, before, nimg)
                # a mean ends where a state is stored, so that a resumed run logs the same
                reported = stores or crossed(config.status, before, nimg)
                with failure.kept():
                    if run is not None and measurement is not None:
                        line = telemetry.record(config, measurement, nimg=before)
                        run.append_telemetry(line)
                        trackers.telemetry(line)
                    progress.advance(nimg - before)
                if reported:
                    metrics = trainer.metrics()  # of all processes, whatever has failed in one
                    with failure.kept():
                        report(metrics, nimg, lr, skipped=batches.skipped)
                    diverged(trainer, end=end)
                    stored.look()
                    if mirror is not None:
                        mirror.push()
                if scores is not None and (end or crossed(job.scores.evaluate, before, nimg)):
                    with failure.kept() if trainer.world == 1 else nullcontext():  # within it, processes share the work
                        scores(nimg)
                if stores or (reported and stored.is_old):
                    stored.begin()
        if trainer.agree(failure.error is not None):
            failure.end(stored, trainer)
        stopped = trainer.nimg < hyper.duration
        if stopped and trainer.nimg > report.nimg:
            lr = _learning_rate(config, before - hyper.batch)
            report(trainer.metrics(), trainer.nimg, lr, skipped=batches.skipped)
        if not stored.is_now:
            stored.begin()
        stored.finish()
    # another process may have received the signal
    return (interrupts.status or 128 + SIGTERM) if stopped else interrupts.status


def _step(job: Training, batch: Any) -> tuple[Measurement | None, float]:
    """Take a step. Returns its telemetry, where it is due, and its learning rate."""
    config, trainer = job.config, job.trainer
    lr = _learning_rate(config, trainer.nimg)
    if config.telemetry and trainer.measures and trainer.nimg // config.hyper.batch % config.telemetry == 0:
        return trainer.measured_step(batch, lr=lr), lr
    trainer.step(batch, lr=lr)
    return None, lr


def _scores(
    job: Training, run: Run | None, open_sampler: OpenSampler, progress: Progress, trackers: Trackers
) -> Scores | None:
    if job.scores.evaluate is None:
        return None
    measured = Measured(job.config, job.dataset, job.trainer, job.machine.device)
    return Scores(job.scores, measured, open_sampler, run=run, say=progress.say, trackers=trackers)


def _batches(job: Training, dataset: Dataset) -> Batches[Any]:
    """This process's share of each batch, on its device."""
    config, trainer = job.config, job.trainer
    network, share = config.network, config.hyper.batch // trainer.world
    reading = Reading(
        dataset,
        config.seed,
        label_dropout=network.label_dropout,
        labelled=network.label_dim > 0,
        flip=config.flip,
        skip_broken=config.skip_broken,
    )
    return Batches(
        reading,
        start=trainer.nimg,
        batch=config.hyper.batch,
        offset=trainer.rank * share,
        count=share,
        workers=job.machine.workers,
        place=trainer.place,
    )


def _learning_rate(config: TrainConfig, nimg: int) -> float:
    hyper = config.hyper
    return learning_rate(nimg, batch=hyper.batch, ref_lr=hyper.lr, ref_batches=hyper.decay, rampup_nimg=hyper.rampup)
