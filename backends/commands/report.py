"""edm2 report: a run, or several side by side, on one page that needs nothing else."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.data.seeds import parse_seeds
from backends.pipeline.report import sections
from backends.pipeline.report.history import History
from backends.pipeline.report.page import page
from backends.pipeline.report.strips import PORTS, open_port
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import Lengths, Location, Text, Whole, choice, quiet, spec
from edm2_core.ema import sigma_rel_to_gamma
from edm2_core.errors import InputError
from edm2_core.sampler import noise_levels

Runs = Annotated[
    tuple[Path, ...], spec(Path, "RUN [RUN ...]", "one or more run folders", many=True), tyro.conf.Positional
]
PortName = Annotated[str | None, choice(*PORTS), quiet]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the report command was asked for."""

    runs: Runs
    """Run folders; several are laid side by side."""
    outdir: Location = None
    """Where report.html and its pictures go. Default: 'report' in the run's folder; ./report for several."""
    sigma_rels: Lengths = None
    """Lengths to slide over. Default: from 0.02 to 0.25, as far as the snapshots give them, and those stored."""
    seeds: Text = None
    """One picture of each at each length, such as 0-9 or 3,7. Default: 0-9."""
    steps: Whole = None
    """Sampling steps. Default: 32."""
    port: PortName = None
    """What samples. Default: the first that is installed."""
    no_samples: bool = False
    """Sample nothing: the page without pictures of seeds takes seconds, whatever the network."""


def run(options: Options) -> None:
    """Write the page and its pictures, and say where.

    Raises:
        InputError: a folder that is no run, a length, seed or step out of range, matplotlib missing, nowhere to write.
        ImportError: the port asked for is not installed.
    """
    for sigma_rel in options.sigma_rels or ():
        sigma_rel_to_gamma(sigma_rel)
    steps = 32 if options.steps is None else options.steps
    noise_levels(steps)
    wanted = sections.Wanted(
        sigma_rels=options.sigma_rels,
        seeds=parse_seeds(options.seeds or "0-9"),
        steps=steps,
        open_port=None if options.no_samples else lambda: open_port(options.port),
    )
    histories = {name: History.of(run) for name, run in _named(options.runs).items()}
    outdir = options.outdir or (options.runs[0] / "report" if len(histories) == 1 else Path("report"))
    canvas = sections.Canvas(outdir)
    made = [
        *sections.differences(histories),
        sections.loss(histories, canvas),
        sections.noise(histories, canvas),
        sections.magnitudes(histories, canvas),
        sections.lengths(histories, canvas, wanted),
        sections.options(histories),
    ]
    title = f"{len(histories)} runs, side by side" if len(histories) > 1 else next(iter(histories))
    path = outdir / "report.html"
    write_bytes(path, page(title=title, summary=sections.summary(histories), sections=made).encode())
    print(f"wrote     {path}, and {canvas.count} pictures beside it")


def _named(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs by the name of their folder, or by their whole path where the name is not theirs alone."""
    folders = [path.resolve() for path in paths]
    if repeated := [folder for folder, times in Counter(folders).items() if times > 1]:
        raise InputError(f"runs must differ, got {repeated[0]} twice: name each once")
    names = Counter(folder.name for folder in folders)
    return {
        folder.name if names[folder.name] == 1 else str(folder): Run(path)
        for folder, path in zip(folders, paths, strict=True)
    }
