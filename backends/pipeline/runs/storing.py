"""How the state of a run is stored: each process its share of the arrays, from a copy, while training goes on."""

import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from filelock import FileLock

from backends.pipeline.checkpoints import states
from backends.trainer import Trainer
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, plan
from edm2_core.state import State

from .agreement import Unsound, check_same, fingerprint
from .config import TrainConfig
from .folder import Run
from .team import Team
from .writer import holder

_LOCK = ".alone.lock"  # in the folder of the states
_OLD = 600.0  # seconds
_WORTH = 20  # times what a state takes of training: it takes 5 % of the time at most


class Place(NamedTuple):
    """Where the states of a run are stored: ``folder``, None in a process that does not see it, and the ranks of the
    ``owners``, those that do."""

    folder: Path | None
    owners: tuple[int, ...]

    @classmethod
    def of(cls, run: Run | None, team: Team, /) -> "Place":
        """That of the first process's ``run``. Hosts need no common disk: only where another process finds the same
        folder, with the same note of its writer, does it store a share. All must call it together."""
        path = team.first(lambda: b"" if run is None else str(run.path).encode()).decode()
        wanted = team.first(lambda: b"" if run is None else holder(run.path))
        sees = team.rank == 0 or (bool(path) and holder(Path(path)) == wanted)
        everywhere = team.gather(np.asarray(sees))
        return cls(Run(path).states_path if sees else None, tuple(rank for rank, it in enumerate(everywhere) if it))


def shares(config: NetworkConfig, count: int, /) -> list[list[str]]:
    """The parameters of a network divided among ``count`` owners of their arrays, about equally by size."""
    sizes = {name: prod(parameter.shape) for name, parameter in plan(config).parameters.items()}
    divided: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        divided[lightest].append(name)
        loads[lightest] += sizes[name]
    return divided


class Stored:
    """The last states of a run; a context manager, at whose end nothing is being written any more. All processes must
    make the same calls together.

    A share is copied to the host and written by a thread. The index, with which the state is complete, is written when
    all shards are there, and the states before are kept until then. A process holds two shares at most.
    """

    def __init__(self, run: Run | None, config: TrainConfig, trainer: Trainer) -> None:
        self._config, self._trainer = config, trainer
        self._folder, self._owners = Place.of(run, trainer.team)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._writing: Future[None] | None = None
        self._begun: int | None = None  # images seen by the state that is being written
        self._last = trainer.nimg or None  # of the last complete state, which a resumed run has begun from
        self._at, self._took = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self) -> None:
        """Store the state as it is now; return when it is copied.

        Raises:
            InputError: weights, moments or averages are not finite, or not the same in all processes; the state that
                was stored before stays. Or the write before has failed.
        """
        self.finish()
        start = time.monotonic()
        share = self._copied()
        self._begun = self._trainer.nimg
        if share is not None and self._folder is not None:
            folder = states.folder_of(self._folder, self._begun)
            self._writing = self._pool.submit(self._write, folder, share)
        self._at = time.monotonic()
        self._took = self._at - start

    @contextmanager
    def kept_at_errors(self) -> Iterator[None]:
        """Within it, an error in a step or a message leaves the state after the last complete step: this process stores
        it by itself, if it has all of it. The others may be gone, or do the same."""
        try:
            yield
        except Unsound:
            raise
        except Exception as error:
            with suppress(Exception):  # the first error says more
                self._store_alone(error)
            raise

    def finish(self) -> None:
        """Wait until the state that is being written is complete.

        Raises:
            InputError: a write has failed, in any process.
        """
        if self._begun is None:
            return
        nimg, writing, why = self._begun, self._writing, ""
        self._begun = self._writing = None
        try:
            if writing is not None:
                writing.result()
        except InputError as error:
            why = str(error)
        for text in self._trainer.team.texts(why):
            if text:
                raise InputError(text)
        if self._trainer.rank == 0 and self._folder is not None and len(self._owners) > 1:
            self._complete(states.folder_of(self._folder, nimg))
        self._last = nimg

    def look(self) -> None:
        """:meth:`finish` if that waits for nothing."""
        busy = self._writing is not None and not self._writing.done()
        if self._begun is not None and not self._trainer.agree(busy):
            self.finish()

    @property
    def is_old(self) -> bool:
        """Whether the last state has become so old, in any process, that its loss would hurt more than to store
        another."""
        age = time.monotonic() - self._at
        return self._trainer.agree(age > max(_OLD, _WORTH * self._took))

    @property
    def is_now(self) -> bool:
        """Whether the state as it is now is stored, or about to be."""
        return self._trainer.nimg in (self._begun, self._last)

    def _copied(self) -> State | None:
        """This process's share, checked, and compared with what the others have of it."""
        trainer, own = self._trainer, None
        prints = []
        for owner, names in zip(self._owners, shares(self._config.network, len(self._owners)), strict=True):
            part = trainer.state(names)
            check_finite(part)
            if trainer.world > 1:
                prints.append(fingerprint(part))
            if owner == trainer.rank:
                own = part
        if trainer.world > 1:
            check_same(b"".join(prints), trainer.team, nimg=trainer.nimg)
        return own

    def _store_alone(self, error: Exception) -> None:
        if self._folder is None:
            return
        if self._writing is not None:
            self._writing.result()
        nimg = self._trainer.nimg
        if nimg in (0, self._last) or states.is_complete(self._folder, nimg):
            return
        state = self._trainer.state_alone(error)
        if state is None:
            return
        check_finite(state)
        with FileLock(self._folder / _LOCK).acquire(blocking=False):  # of those that do the same, one is enough
            states.store(self._folder, state)
            states.remove_others(self._folder, keep=self._config.keep)
        print(f"saved    the state at {state.nimg} images", file=sys.stderr)

    def _write(self, folder: Path, share: State) -> None:
        index, count = self._owners.index(self._trainer.rank), len(self._owners)
        states.save_state(states.shard_of(folder, index, count), share)
        if count == 1:
            self._complete(folder)

    def _complete(self, folder: Path) -> None:
        states.complete(folder, count=len(self._owners))
        states.remove_others(folder.parent, keep=self._config.keep)


def check_finite(state: State, /) -> None:
    """Raises Unsound if a number of ``state`` is not finite."""
    for name, array in states.arrays_of(state).items():
        if not (np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0))):  # NaN is both
            raise Unsound(
                f"a state must be finite to be stored, got other numbers in {name} after {state.nimg} images: training "
                "has diverged; the state before is kept; begin again with a smaller --lr in another --outdir"
            )


def same_everywhere(trainer: Trainer, config: TrainConfig, /) -> None:
    """Raises InputError unless all processes have the same state."""
    prints: Sequence[bytes] = [fingerprint(trainer.state(names)) for names in shares(config.network, trainer.world)]
    check_same(b"".join(prints), trainer.team, nimg=trainer.nimg)
