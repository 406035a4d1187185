"""edm2 reconstruct: computes averages of any length from stored ones, in one pass over the files."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.folders import OUTPUTS
from backends.pipeline.checkpoints.outputs import Writer, plan_outputs
from backends.pipeline.checkpoints.reconstruct import GiB
from backends.pipeline.checkpoints.sources import Broken, Source
from backends.pipeline.runs.command_line import reader
from backends.pipeline.runs.exit_codes import Interrupts
from backends.pipeline.runs.progress import Progress
from edm2_core.ema import StorageDtype
from edm2_core.errors import InputError

from .sources import SourceOptions, print_skipped


def _override(text: str) -> tuple[str, float]:
    pattern, _, length = text.rpartition("=")
    if not pattern:
        raise ValueError(text)
    return pattern, float(length)


Overrides = Annotated[
    tuple[tuple[str, float], ...],
    reader(_override, "PATTERN=LENGTH [...]", "PATTERN=LENGTH such as 'unet.enc.*=0.05'", nargs="*"),
]


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Options of ``edm2 reconstruct``."""

    sigma_rels: tuple[float, ...] = ()
    """Relative lengths to reconstruct, each within (0, 0.2887); one file each."""
    at: int | None = None
    """Time of the averages, such as 512Mi. Without it: the time of the last file."""
    override: Overrides = ()
    """Other lengths for the arrays whose names match."""
    outdir: Path | None = None
    """Folder of the averages. Without it: 'reconstructed' in the source's folder; ./reconstructed for a URL."""
    dtype: StorageDtype = "float16"
    """Dtype of the averages in the files; tensors that it cannot hold are stored in float32."""
    memory: int = GiB
    """Bytes of memory to use, independent of the size of the network."""
    max_error: float = inf
    """Largest predicted error to accept; above it nothing is written."""
    dry_run: bool = False
    """Print the predicted errors and stop."""


def run(options: Options) -> int:
    """Reconstruct averages and write them to files. Returns the exit status.

    Raises:
        InputError: as :mod:`backends.pipeline.checkpoints.sources` and :mod:`~backends.pipeline.checkpoints.outputs`,
            or a predicted error above the limit.
    """
    if not options.sigma_rels:
        raise InputError("--sigma-rels must be one or more lengths, got none: add --sigma-rels 0.05 0.10, for example")
    sources = options.open()
    while True:
        try:
            return _reconstruct(options, sources)
        except Broken as error:
            if not options.skip_broken:
                raise
            print_skipped(error)
            sources = [source for source in sources if source.path != error.path]


def _reconstruct(options: Options, sources: list[Source]) -> int:
    combination = Combination.of(sources, time=options.at, sigma_rels=options.sigma_rels, overrides=options.override)
    _print_errors(combination, options.max_error)
    if options.dry_run:
        return 0
    folder = options.outdir or options.beside(OUTPUTS)
    todo, existing = plan_outputs(folder, combination, dtype=options.dtype)
    for output in existing:
        print(f"exists    {output.path}")
    if not todo:
        return 0
    with (
        Interrupts() as interrupts,
        Writer(todo, combination, dtype=options.dtype, memory=options.memory) as writer,
    ):
        if writer.done:
            print(f"resumed   at {writer.done} of {writer.total} blocks")
        done, total = writer.elements
        with Progress(total=total, start=done, unit="weights") as progress:
            for elements, journal_written in writer.run(lambda: interrupts.signum is not None):
                progress.advance(elements)
                if journal_written:
                    progress.report()
        if writer.done < writer.total:
            print(f"stopped   at {writer.done} of {writer.total} blocks; the same command resumes")
            return interrupts.status
        for path in writer.finish():
            print(f"wrote     {path}")
    return 0


def _print_errors(combination: Combination, limit: float) -> None:
    """Print the predicted error of each length. Raises InputError where one is above ``limit``."""
    error, times = combination.error, [source.time for source in combination.usable]
    print(f"files     {len(times)}, from time {min(times)} to {max(times)}; averages at {combination.time}")
    print("length    profile error  storage rounding")
    for length, profile, rounding in zip(combination.lengths, error.profile, error.rounding, strict=True):
        note = "  stored" if profile == rounding == 0 else ""
        print(f"{length:<8.4g}  {profile:13.2e}  {rounding:16.2e}{note}")
    worst = error.total.max()
    if not worst <= limit:
        raise InputError(
            f"predicted errors must be at most {limit:g}, got {worst:.3g}: choose other lengths, or allow more"
        )
