"""What ends a run early: errors, after which all processes store the state, and gradients that are never finite."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from backends.trainer import Trainer
from edm2_core.errors import InputError

from .agreement import Unsound
from .storing import Stored

_MOST_ZEROED = 100  # steps in a row


class Divergence:
    """Refuses to go on where gradients were not finite for too many steps in a row, or in all of a run's."""

    def __init__(self, nimg: int, batch: int) -> None:
        self._begin, self._batch = nimg, batch

    def __call__(self, trainer: Trainer, *, end: bool) -> None:
        """Check the steps up to the last call of ``trainer.metrics``. Raises Unsound."""
        steps, nimg = trainer.zeroed_in_a_row, trainer.nimg
        first = nimg - steps * self._batch
        if steps >= _MOST_ZEROED or (end and steps and first <= self._begin):
            raise Unsound(
                f"gradients must be finite, got others in all {steps} steps from {first} to {nimg} images: training "
                "has diverged; begin again with a smaller --lr in another --outdir"
            )


class Failure:
    """The first error of this process outside a step, such as an unreadable image, a full disk at the log or a closed
    output. It is kept until all processes have heard of it and have stored their state."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it, an error ends the block alone. No process may wait for another in it after what can fail."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def end(self, stored: Stored, trainer: Trainer) -> None:
        """Store the state, and raise the error, or in a process without one that another has it."""
        with suppress(InputError):  # the first error says more
            if not stored.is_now:
                stored.begin()
            stored.finish()
            if trainer.rank == 0:
                with suppress(OSError):
                    print(f"saved    the state at {trainer.nimg} images", file=sys.stderr)
        raise self.error or InputError("all processes must go on, got an error in another: see what it says")
