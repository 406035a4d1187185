"""Options of commands that read a folder of stored averages: which files, and what they hold."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.sources import Broken, Source, open_sources
from edm2_core.ema import Length
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of every command that reads stored averages."""

    source: tyro.conf.Positional[Path]
    """A run, or a folder of snapshots, of ema-pytorch's files, of safetensors named by step, of official pickles."""
    skip_broken: bool = False
    """Leave broken files out, and solve without them."""
    source_sigma_rels: tuple[float, ...] = ()
    """Length of the average in files that do not say it; for ema-pytorch one per index."""
    source_half_life: float | None = None
    """Half-life of the traditional average in files that do not say it, in their unit of time."""
    source_raw: float | None = None
    """Files that do not say it hold raw weights, and this is the duration of a step in their unit of time."""
    source_update_every: int = 1
    """Steps between updates of a tracker whose updates ignore that number, as ema-pytorch's do."""

    def open(self) -> list[Source]:
        """The sources. Raises InputError as :func:`open_sources`; prints broken files that are to be skipped."""
        half_life, step = self.source_half_life, self.source_raw
        lengths = [
            tuple(map(Length.of, self.source_sigma_rels)),
            () if half_life is None else (Length.half_life(half_life),),
            () if step is None else (Length.raw(step),),
        ]
        if sum(map(bool, lengths)) > 1:
            raise InputError(
                "files hold averages of known lengths, traditional ones, or raw weights, got several: say one of these"
            )
        described = Described(lengths=sum(lengths, ()), update_every=self.source_update_every)
        return open_sources(self.source, described=described, skip=print_skipped if self.skip_broken else None)


def print_skipped(error: Broken) -> None:
    print(f"skipped   {error}")
