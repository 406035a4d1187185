"""The lengths of averages in files without metadata, as the user describes them."""

from dataclasses import dataclass
from pathlib import Path

from edm2_core.ema import Length
from edm2_core.errors import InputError

from .torch_files import tracked_length


class Undescribed(InputError):
    """The file at ``path`` does not record what was averaged, and no option says it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} does not say what was averaged: add --source-sigma-rels, --source-half-life or --source-raw"
        )
        self.path = path


@dataclass(frozen=True, kw_only=True)
class Described:
    """The lengths of averages: one for all files, or one per index in their names (ema-pytorch).

    ``Length.raw(step)`` stands for weights that are not averaged. ``update_every``: the tracker updated its averages
    only every so many steps, each time as if it were every step, as ema-pytorch does. ``pattern`` and ``last_time`` are
    those of :func:`~.file_times.named_times`.
    """

    lengths: tuple[Length, ...] = ()
    update_every: int = 1
    pattern: str | None = None
    last_time: int | None = None

    def __post_init__(self) -> None:
        if self.update_every < 1:
            raise InputError(f"update_every must be at least 1, got {self.update_every}: 1 is every step")

    def length(self, path: Path, index: int) -> Length:
        """The length of the average in a file. Raises :class:`Undescribed` where nothing is said of it."""
        count = len(self.lengths)
        if not count:
            raise Undescribed(path)
        if count > 1 and index >= count:
            raise InputError(f"{path} has index {index}, got {count} lengths: give one for each index")
        return tracked_length(self.lengths[min(index, count - 1)], self.update_every)
