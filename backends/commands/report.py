"""edm2 report: shows a run, or several side by side, on one HTML page without external resources."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.remote import is_url, local
from backends.pipeline.report import sections
from backends.pipeline.report.figures import measured
from backends.pipeline.report.history import History
from backends.pipeline.report.page import page
from backends.pipeline.report.strips import open_port
from backends.pipeline.runs.command_line import parse_seeds
from backends.pipeline.runs.folder import Run
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.sampler import noise_levels


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 report``."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """One or more run folders; several are shown side by side."""
    outdir: Path | None = None
    """Folder of report.html and pictures. Without it: 'report' in the run's folder; for several, or a URL, ./report."""
    sigma_rels: tuple[float, ...] = ()
    """Lengths to sample. Without it: from 0.02 to 0.25, if their predicted error is small, and the stored ones."""
    seeds: str = "0-9"
    """Seeds to sample at each length, such as 0-9 or 3,7."""
    steps: int = 32
    """Sampling steps."""
    port: Literal["torch", "jax", "mlx"] | None = None
    """Port that samples. Without it: the first one installed."""
    no_samples: bool = False
    """Do not sample: the page is ready in seconds, without pictures of seeds."""


def run(options: Options) -> None:
    """Write the page and its pictures, and print the path.

    Raises:
        InputError: a folder that is not a run, a length, seed or step out of range, no matplotlib, or a failed write.
        ImportError: the port asked for is not installed.
    """
    for sigma_rel in options.sigma_rels:
        Length.of(sigma_rel)
    noise_levels(options.steps)
    sampling = sections.Sampling(
        sigma_rels=options.sigma_rels or None,
        seeds=parse_seeds(options.seeds),
        steps=options.steps,
        open_port=None if options.no_samples else lambda: open_port(options.port),
    )
    histories = {name: History.of(run) for name, run in _named(options.runs).items()}
    alone = len(histories) == 1 and not is_url(options.runs[0])
    outdir = options.outdir or (options.runs[0] / "report" if alone else Path("report"))
    canvas = sections.Canvas(outdir)
    content = [
        *sections.differences(histories),
        sections.loss(histories, canvas),
        sections.noise(histories, canvas),
        sections.magnitudes(histories, canvas),
        sections.lengths(histories, canvas, sampling),
        measured({name: history.run for name, history in histories.items()}, canvas),
        sections.options(histories),
    ]
    title = f"{len(histories)} runs, side by side" if len(histories) > 1 else next(iter(histories))
    path = outdir / "report.html"
    write_bytes(path, page(title=title, summary=sections.summary(histories), sections=content).encode())
    print(f"wrote     {path}, and {canvas.count} pictures beside it")


def _named(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs by the name of their folder, or by its full path if several have that name."""
    if not paths:
        raise InputError("runs must be one or more run folders, got none: edm2 report runs/mine for example")
    paths = [local(path) for path in paths]
    folders = [path.resolve() for path in paths]
    if repeated := [folder for folder, times in Counter(folders).items() if times > 1]:
        raise InputError(f"runs must differ, got {repeated[0]} twice: name each once")
    names = Counter(folder.name for folder in folders)
    return {
        folder.name if names[folder.name] == 1 else str(folder): Run(path)
        for folder, path in zip(folders, paths, strict=True)
    }
