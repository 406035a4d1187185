"""What keeps the state of a run: it is stored at every end but that of a broken step, and never with numbers that are
not finite."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import numpy as np

from backends.pipeline.checkpoints.states import arrays_of, save_state
from backends.trainer import Trainer
from edm2_core.errors import InputError
from edm2_core.state import State

from .agreement import check_same_state
from .folder import Run

_MOST_ZEROED = 100  # steps in a row
_OLD = 600.0  # seconds
_WORTH = 20  # times what storing a state takes: it then takes 5 % of the time at most


def store(run: Run | None, trainer: Trainer) -> None:
    """Store the state; ``run`` is None in processes that do not write. All processes must call it together.

    Raises:
        InputError: weights, moments or averages are not finite, or not the same in all processes; the state that was
            stored before stays. Or a failed write.
    """
    state = trainer.state()  # in every process: they gather it together
    _check_finite(state)
    if trainer.team.world > 1:
        check_same_state(state, trainer.team)
    if run is not None:
        save_state(run.state_path, state)


class Stored:
    """The last state that was stored, in time."""

    def __init__(self, run: Run | None, trainer: Trainer) -> None:
        self._run, self._trainer = run, trainer
        self._at, self._took = time.monotonic(), 0.0

    def renew(self) -> None:
        """:func:`store`."""
        start = time.monotonic()
        store(self._run, self._trainer)
        self._at = time.monotonic()
        self._took = self._at - start

    @property
    def is_old(self) -> bool:
        """Whether it has become so old, in any process, that its loss would hurt more than to store another. All must
        ask together."""
        age = time.monotonic() - self._at
        return self._trainer.agree(age > max(_OLD, _WORTH * self._took))


def _check_finite(state: State) -> None:
    for name, array in arrays_of(state).items():
        if not (np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0))):  # NaN is both
            raise InputError(
                f"a state must be finite to be stored, got other numbers in {name} after {state.nimg} images: training "
                "has diverged; the state before is kept; begin again with a smaller --lr in another --outdir"
            )


class Divergence:
    """Refuses to go on where gradients were not finite for too many steps in a row, or in all of a run's."""

    def __init__(self, nimg: int, batch: int) -> None:
        self._begin, self._batch = nimg, batch

    def __call__(self, trainer: Trainer, *, end: bool) -> None:
        """Check the steps up to the last call of ``trainer.metrics``. Raises InputError."""
        steps, nimg = trainer.zeroed_in_a_row, trainer.nimg
        first = nimg - steps * self._batch
        if steps >= _MOST_ZEROED or (end and steps and first <= self._begin):
            raise InputError(
                f"gradients must be finite, got others in all {steps} steps from {first} to {nimg} images: training "
                "has diverged; begin again with a smaller --lr in another --outdir"
            )


class SavedAtErrors:
    """Context manager of a training loop: an error outside :meth:`step`, such as an unreadable image, a full disk at
    the log or a closed output, first stores the state.

    Not within a step, whose weights are half updated or whose snapshots are missing; nor with several processes, which
    would wait for each other. The state of the last interval remains then.
    """

    def __init__(self, run: Run | None, trainer: Trainer) -> None:
        self._run, self._trainer, self._whole = run, trainer, True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it, the weights change and their snapshots are written: an error leaves a state that lacks them."""
        self._whole = False
        yield
        self._whole = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or not self._whole or self._run is None or self._trainer.team.world > 1:
            return
        with suppress(InputError):  # the first error says more
            store(self._run, self._trainer)
            with suppress(OSError):
                print(f"saved    {self._run.state_path} at {self._trainer.nimg} images", file=sys.stderr)
