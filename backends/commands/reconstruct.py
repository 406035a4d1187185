"""edm2 reconstruct: averages of any length from stored ones, in one pass over the files."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from backends.pipeline.checkpoints.outputs import Writer, plan_outputs
from backends.pipeline.checkpoints.reconstruct import GiB, Recipe, block_size
from backends.pipeline.checkpoints.reconstruct import run as compute
from backends.pipeline.checkpoints.sources import Broken, Described, Source, open_sources
from backends.pipeline.runs.exit_codes import Interrupts
from backends.pipeline.runs.options import Bytes, Given, Images, Lengths, Location, Number, Whole, choice, quiet, spec
from backends.pipeline.runs.progress import Progress
from edm2_core.errors import InputError

_EVERY = 10.0  # seconds from journal to journal


def _override(text: str) -> tuple[str, float]:
    pattern, _, length = text.rpartition("=")
    if not pattern:
        raise ValueError(text)
    return pattern, float(length)


Overrides = Annotated[
    tuple[tuple[str, float], ...] | None,
    spec(_override, "PATTERN=LENGTH [...]", "PATTERN=LENGTH, 'unet.enc.*=0.05' say", many=True),
    quiet,
]
Dtype = Annotated[str | None, choice("float16", "float32"), quiet]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which files, and what they hold."""

    source: Given
    """A run, or a folder of snapshots, of ema-pytorch's files, of safetensors named by step, of official pickles."""
    skip_broken: bool = False
    """Leave broken files out, and solve without them."""
    source_sigma_rels: Lengths = None
    """For files that do not say it: the length they have, or one per index of ema-pytorch's."""
    source_half_life: Number = None
    """For files that do not say it: the half-life of the traditional average that they are, in their unit of time."""
    source_raw: Number = None
    """For files that do not say it: they are raw weights, and a step took this long in their unit of time."""
    source_update_every: Whole = None
    """For files of a tracker that ignores its interval, as ema-pytorch's: that interval. Default: 1."""


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """What the reconstruct command was asked for."""

    sigma_rels: Lengths = None
    """Relative lengths wanted, each within (0, 0.2887); one file each, all in one pass."""
    at: Images = None
    """Time of the averages, 512Mi say. Default: the last file's."""
    override: Overrides = None
    """Other lengths for the arrays whose names match."""
    outdir: Location = None
    """Where the averages go. Default: 'reconstructed' in the source's folder."""
    dtype: Dtype = None
    """How they are stored. Default: float16."""
    memory: Bytes = None
    """Memory to use, whatever the size of the network. Default: 1Gi."""
    max_error: Number = None
    """Refuse if the predicted error of any is larger. Default: never."""
    dry_run: bool = False
    """Print the predicted errors, and compute nothing."""


def run(options: Options) -> int:
    """Reconstruct what ``options`` ask for. Returns the exit status.

    Raises:
        InputError: see :mod:`backends.pipeline.checkpoints.sources`, :mod:`~backends.pipeline.checkpoints.outputs`;
            an error above the limit.
    """
    if not options.sigma_rels:
        raise InputError("a length must be wanted, got none: add --sigma-rels 0.05 0.10, say")
    dropped: set[Path] = set()
    while True:
        try:
            return _reconstruct(options, dropped)
        except Broken as error:
            if not options.skip_broken or error.path in dropped:
                raise
            _drop(dropped)(error)


def _reconstruct(options: Options, dropped: set[Path]) -> int:
    sources = open_described(options, dropped)
    recipe = Recipe.of(sources, time=options.at, sigma_rels=options.sigma_rels or (), overrides=options.override or ())
    _say(recipe, options.max_error)
    if options.dry_run:
        return 0
    folder = options.outdir or options.source / "reconstructed"
    dtype = options.dtype or "float16"
    todo, there = plan_outputs(folder, recipe, dtype=dtype)
    for output in there:
        print(f"is there  {output.path}")
    if not todo:
        return 0
    recipe = Recipe.of(
        sources, time=options.at, sigma_rels=[output.sigma_rel for output in todo], overrides=recipe.overrides
    )
    memory = GiB if options.memory is None else options.memory
    size = block_size(recipe, memory=memory)
    total = sum(1 for _ in recipe.blocks(size))
    with Interrupts() as interrupts, Writer(todo, recipe, dtype=dtype, block_size=size) as writer:
        if writer.done:
            print(f"goes on   at {writer.done} of {total} blocks")
        with Progress(total=recipe.size, start=_elements(recipe, size, writer.done), unit="weights") as progress:
            noted = time.monotonic()
            for done, elements in compute(recipe, writer.write, memory=memory, skip=writer.done):
                progress.advance(elements)
                if interrupts.signum is not None or time.monotonic() - noted > _EVERY:
                    writer.checkpoint(done)
                    noted = time.monotonic()
                    progress.report()
                if interrupts.signum is not None:
                    print(f"stopped   at {done} of {total} blocks; the same command goes on")
                    return interrupts.status
        for path in writer.finish():
            print(f"wrote     {path}")
    return 0


def open_described(options: SourceOptions, dropped: set[Path]) -> list[Source]:
    """The sources that ``options`` name and describe, but for those ``dropped``, to which broken ones are added."""
    described = Described(
        sigma_rels=options.source_sigma_rels or (),
        half_life=options.source_half_life,
        raw_step=options.source_raw,
        update_every=1 if options.source_update_every is None else options.source_update_every,
    )
    skip = _drop(dropped) if options.skip_broken else None
    found = open_sources(options.source, described=described, skip=skip)
    return [source for source in found if source.path not in dropped]


def _drop(dropped: set[Path]) -> Callable[[Broken], None]:
    def drop(error: Broken) -> None:
        if error.path not in dropped:
            print(f"skipped   {error}")
        dropped.add(error.path)

    return drop


def _say(recipe: Recipe, limit: float | None) -> None:
    """Print what each length is predicted to be off by. Raises InputError where that is more than ``limit``."""
    error, times = recipe.error, [source.time for source in recipe.usable]
    print(f"files     {len(times)}, from time {min(times)} to {max(times)}; averages at {recipe.time}")
    print("length    profile error  storage rounding")
    for length, profile, rounding in zip(recipe.lengths, error.profile, error.rounding, strict=True):
        note = "  stored" if profile == rounding == 0 else ""
        print(f"{length:<8.4g}  {profile:13.2e}  {rounding:16.2e}{note}")
    worst = error.total.max()
    if limit is not None and not worst <= limit:
        raise InputError(
            f"predicted errors must be at most {limit:g}, got {worst:.3g}: want other lengths, or allow more"
        )


def _elements(recipe: Recipe, size: int, blocks: int) -> int:
    return sum(block.stop - block.start for block, _ in zip(recipe.blocks(size), range(blocks), strict=False))
