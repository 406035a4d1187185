"""Options of commands that read a folder of stored averages: the files and their contents."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.remote import is_url
from backends.pipeline.checkpoints.sources import Broken, Source, open_sources
from edm2_core.ema import Length
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of every command that reads stored averages."""

    source: tyro.conf.Positional[Path]
    """A run, or a folder of snapshots, of ema-pytorch's files, of checkpoints named by step, of official pickles."""
    pattern: str | None = None
    """Where the time is in names of files that do not record it, such as 'step{time}_cat_*' or
    'checkpoint-{time}/unet_ema'. Without it: the one number that differs between all names."""
    last_time: int | None = None
    """Time of the one file whose name has none."""
    skip_broken: bool = False
    """Skip broken files instead of stopping at them."""
    source_sigma_rels: tuple[float, ...] = ()
    """Length of the average in files that do not record it; for ema-pytorch one per index."""
    source_half_life: float | None = None
    """Half-life of the traditional average in files that do not record it, in their unit of time."""
    source_raw: float | None = None
    """For files that hold raw weights and do not record it: the duration of a step in their unit of time."""
    source_update_every: int = 1
    """Steps between updates of the tracker, if its updates ignore that number, as those of ema-pytorch do."""

    def beside(self, name: str) -> Path:
        """Where an output is written by default: in the source's folder; for a URL, in the current one."""
        return Path(name) if is_url(self.source) else self.source / name

    def open(self) -> list[Source]:
        """Open the sources; print the broken files that are skipped. Raises InputError as :func:`open_sources`."""
        half_life, step = self.source_half_life, self.source_raw
        lengths = [
            tuple(map(Length.of, self.source_sigma_rels)),
            () if half_life is None else (Length.half_life(half_life),),
            () if step is None else (Length.raw(step),),
        ]
        if sum(map(bool, lengths)) > 1:
            raise InputError(
                "--source-sigma-rels, --source-half-life and --source-raw exclude each other, got several: give one"
            )
        described = Described(
            lengths=sum(lengths, ()),
            update_every=self.source_update_every,
            pattern=self.pattern,
            last_time=self.last_time,
        )
        skip = print_skipped if self.skip_broken else None
        return open_sources(self.source, described=described, skip=skip, show=print)


def print_skipped(error: Broken) -> None:
    print(f"skipped   {error}")
