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
    source: tyro.conf.Positional[Path]
    """A run, or a folder of snapshots, of ema-pytorch's files, of safetensors named by step, of official pickles."""
    skip_broken: bool = False
    """Leave broken files out, and solve without them."""
    source_sigma_rels: tuple[float, ...] = ()
    """For files that do not say it: the length of their average, or one per index of ema-pytorch's."""
    source_half_life: float | None = None
    """For files that do not say it: the half-life of their traditional average, in their unit of time."""
    source_raw: float | None = None
    """For files that do not say it: they hold raw weights, and a step took this long in their unit of time."""
    source_update_every: int = 1
    """For files of a tracker that ignores its update interval, as ema-pytorch's does: that interval."""

    def open(self) -> list[Source]:
        """The sources. Raises InputError as :func:`open_sources`; prints broken files that are to be skipped."""
        lengths = list(map(Length.of, self.source_sigma_rels))
        kinds = [self.source_half_life is not None, self.source_raw is not None, bool(lengths)]
        if sum(kinds) > 1:
            raise InputError(
                "files hold averages of known lengths, traditional ones, or raw weights, got several: say one"
            )
        if self.source_half_life is not None:
            lengths = [Length.half_life(self.source_half_life)]
        if self.source_raw is not None:
            lengths = [Length.raw(self.source_raw)]
        described = Described(lengths=tuple(lengths), update_every=self.source_update_every)
        return open_sources(self.source, described=described, skip=print_skipped if self.skip_broken else None)


def print_skipped(error: Broken) -> None:
    print(f"skipped   {error}")
