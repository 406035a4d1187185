"""One truth among the processes that train a run: the first one's folder, config and state are those of all."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from backends.pipeline.checkpoints.checksums import KEY
from backends.pipeline.checkpoints.states import arrays_of, digests, load_state, state_of
from backends.trainer import Trainer
from edm2_core.errors import InputError
from edm2_core.state import State

from .config import TrainConfig
from .folder import Run, create
from .initial import Initial, initial
from .options import TrainOptions, parse_train
from .team import Team
from .writer import writing


class Unsound(InputError):
    """The state must not be stored: training has diverged, or the processes differ."""


_OF_HOST = ("data", "condition", "init", KEY)


def resumed_by_first(options: TrainOptions, team: Team, /, *, prog: str) -> TrainOptions:
    """``options``, resuming what the first process resumes, which alone needs the run folder.

    Raises:
        InputError: another process finds a run where the first finds none.
    """
    own = "" if options.previous is None else options.previous.to_json()
    first, *others = team.texts(own)
    if any(others) and not first:
        raise InputError(
            f"the first process must have the run that is resumed, got none in its {options.outdir}, and one in "
            "another's: start the processes so that the first has it"
        )
    if own == first:
        return options
    previous = TrainConfig.from_json(first, name=f"{options.outdir} of the first process")
    return parse_train(options.words, prog=prog, description="", previous=previous)


def check_same_config(config: TrainConfig, team: Team, /) -> None:
    """Raises InputError if another process would train something else. Paths may differ from host to host."""
    first, *others = map(json.loads, team.texts(config.to_json()))
    for rank, other in enumerate(others, 1):
        names = ", ".join(name for name in first if first[name] != other.get(name) and name not in _OF_HOST)
        if names:
            raise InputError(
                f"all processes must train the same, got another {names} in process {rank}: start all with one command "
                "and the same data"
            )


def stored_images(run: Run | None, previous: TrainConfig | None, team: Team, /) -> int:
    """Images seen by the state that the first process has stored; 0 of a new run.

    Raises:
        InputError: the state is damaged, or the log shows that one was stored and it is missing.
    """

    def stored() -> bytes:
        if run is None or previous is None:
            return b"0"
        last = max((record["nimg"] for record in run.log()), default=0)
        # the first is complete, at the latest, when the second is begun
        if run.state_path is None and last > 2 * (previous.checkpoint or 0) + previous.hyper.batch:
            raise InputError(
                f"a run must have its state to be resumed after {last} images, got none in {run.states_path}: "
                "restore it, or choose another --outdir"
            )
        return str(run.state_nimg()).encode()

    return int(team.first(stored))


def hold(outdir: Path | None, name: str, held: ExitStack, /, *, start: int, team: Team) -> Run | None:
    """The run, whose folder is made and held until ``held`` closes; None in processes other than the first.

    Raises:
        InputError: another process writes it, or it is no longer at ``start`` images.
    """
    run: Run | None = None

    def first() -> bytes:
        nonlocal run
        run = Run(create(outdir, name))
        held.enter_context(writing(run.path))
        if (now := run.state_nimg()) != start:
            raise InputError(
                f"a run must rest while it is resumed, got {now} images for {start} in {run.path}: try again"
            )
        return b""

    team.first(first)
    return run


def load_into(trainer: Trainer, config: TrainConfig, outdir: Path | None, /, *, start: int) -> Initial | None:
    """Make the first process's state, after ``start`` images, that of all. Returns what a new run begins from, if that
    is a stored network.

    Raises:
        InputError: a damaged state, or one that only another process has.
    """
    begin: Initial | None = None

    def load() -> State | None:
        nonlocal begin
        if outdir is not None and start:
            return stored_state(Run(outdir), config)
        begin = initial(config) if config.init is not None else None
        return None if begin is None else begin.state(config)

    if (state := shared_state(load, trainer.team)) is not None:
        trainer.load_state(state)
    return begin


def stored_state(run: Run, config: TrainConfig, /) -> State:
    """The state that a run of ``config`` continues from.

    Raises:
        InputError: there is none, or it is damaged or of another network.
    """
    if (path := run.state_path) is None:
        raise InputError(f"a run must have its state to be resumed, got none in {run.states_path}: restore it")
    return load_state(path, config.network, config.hyper.lengths)


def shared_state(load: Callable[[], State | None], team: Team, /) -> State | None:
    """What ``load`` returns in the first process, in all. Where another process loads the same, nothing is sent.

    Raises:
        InputError: ``load`` of the first process raises it, or another process has a state and the first has none.
    """
    if team.world == 1:
        return load()
    own = None

    def first() -> bytes:
        nonlocal own
        own = load()
        return b"" if own is None else fingerprint(own)

    wanted = team.first(first)
    if team.rank > 0:
        try:
            own = load()
        except InputError:
            own = None  # missing or damaged here: the first one's is sent
    have = [row.tobytes() for row in team.gather(np.frombuffer(fingerprint(own) if own else b"", np.uint8))]
    if not wanted and any(have):
        raise InputError(
            "the first process must have the state that is resumed, got none there, and one in another process: "
            "restore it, or choose another --outdir"
        )
    lacking = [rank for rank, print_ in enumerate(have) if print_ != wanted]
    if lacking:
        team.say(f"sent     the state to process {', '.join(map(str, lacking))}, which had another or none")
        return _sent(own, team)
    return own


def check_same(fingerprints: bytes, team: Team, /, *, nimg: int) -> None:
    """Raises Unsound if those of the state in another process are others."""
    first, *others = team.gather(np.frombuffer(fingerprints, np.uint8))
    different = [rank for rank, other in enumerate(others, 1) if not np.array_equal(first, other)]
    if different:
        raise Unsound(
            f"all processes must have the same state, got another in process {different[0]} after {nimg} images: "
            "a device or its memory is at fault; the last state was kept, resume from it"
        )


def fingerprint(state: State, /) -> bytes:
    """A hash of all that ``state`` holds. Of a stored one, as it was written: its arrays are not read for this."""
    sums = xxhash.xxh3_64(f"{state.nimg} {state.steps}".encode())
    for name, digits in sorted(digests(state).items()):
        sums.update(f"{name} {digits}".encode())
    return sums.digest()


def _sent(own: State | None, team: Team) -> State:
    """The state of the first process, array by array."""
    arrays = arrays_of(own) if team.rank == 0 and own is not None else {}
    counters = (0, 0) if own is None else (own.nimg, own.steps)
    head = [*counters, {name: array.shape for name, array in arrays.items()}]
    nimg, steps, shapes = json.loads(team.first(lambda: json.dumps(head).encode()))
    received = {}
    for name, shape in shapes.items():
        data = team.first(partial(_bytes, arrays, name))
        received[name] = np.frombuffer(data, np.float32).reshape(shape)
    return state_of(received, nimg=nimg, steps=steps)


def _bytes(arrays: Mapping[str, np.ndarray], name: str) -> bytes:
    return np.ascontiguousarray(arrays[name], np.float32).tobytes()
