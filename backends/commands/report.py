"""edm2 report: shows a run, or several side by side, on one HTML page, which may follow them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
import xxhash

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.remote import is_url, local
from backends.pipeline.report import sections
from backends.pipeline.report.figures import measured
from backends.pipeline.report.history import History
from backends.pipeline.report.page import page
from backends.pipeline.report.serve import HOST, Live, open_server
from backends.pipeline.report.strips import open_port
from backends.pipeline.report.verdict import verdict
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
    serve: bool = False
    """Serve the page on this machine instead, following the runs while they train."""
    http_port: int = 8642
    """Port of --serve; 0: any free one."""


def run(options: Options) -> None:
    """Write the page and its pictures, and print the path; or serve it until Ctrl-C.

    Raises:
        InputError: a folder that is not a run, a length, seed or step out of range, no matplotlib, a failed write, or a
            port that is taken.
        ImportError: the port asked for is not installed.
    """
    for sigma_rel in options.sigma_rels:
        Length.of(sigma_rel)
    noise_levels(options.steps)
    alone = len(options.runs) == 1 and not is_url(options.runs[0])
    report = Report(
        _named(options.runs),
        options.outdir or (options.runs[0] / "report" if alone else Path("report")),
        sections.Sampling(
            sigma_rels=options.sigma_rels or None,
            seeds=parse_seeds(options.seeds),
            steps=options.steps,
            open_port=None if options.no_samples else lambda: open_port(options.port),
        ),
    )
    if not options.serve:
        print(f"wrote     {report.write()}, and {report.pictures} pictures beside it")
        return
    report.check()
    with open_server(Live(report.html, report.version), options.http_port) as server:
        print(f"serving   http://{HOST}:{server.server_address[1]}, which follows the runs; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class Report:
    """The page of ``runs``, which may still train. Its pictures are written into ``outdir`` whenever it is made."""

    def __init__(self, runs: Mapping[str, Run], outdir: Path, sampling: sections.Sampling) -> None:
        self._runs, self._outdir, self._sampling = runs, outdir, sampling
        self._lengths: tuple[str, sections.Section] | None = None
        self.pictures = 0

    def check(self) -> None:
        """Raise InputError unless all are runs, which may have nothing yet but their config."""
        for run in self._runs.values():
            run.config()

    def write(self) -> Path:
        """Write it as report.html; returns the path."""
        path = self._outdir / "report.html"
        write_bytes(path, self.html().encode())
        return path

    def html(self, version: str | None = None) -> str:
        """The page as the runs are now; with a ``version``, one that follows them."""
        histories = {name: History.of(run) for name, run in self._runs.items()}
        canvas = sections.Canvas(self._outdir)
        content = [
            *verdict(histories),
            *sections.differences(histories),
            sections.loss(histories, canvas),
            sections.noise(histories, canvas),
            sections.magnitudes(histories, canvas),
            self._of_lengths(histories, canvas),
            measured(self._runs, canvas),
            sections.options(histories),
        ]
        self.pictures = canvas.count
        title = f"{len(histories)} runs, side by side" if len(histories) > 1 else next(iter(histories))
        return page(title=title, summary=sections.summary(histories), sections=content, version=version)

    def version(self) -> str:
        """A hash of what lies in the folders of the runs."""
        return _hash(path for run in self._runs.values() for path in (*run.path.glob("*.json*"), *_snapshots(run)))

    def _of_lengths(self, histories: Mapping[str, History], canvas: sections.Canvas) -> sections.Section:
        """Sampled again where there are other snapshots."""
        version = _hash(path for run in self._runs.values() for path in _snapshots(run))
        if self._lengths is None or self._lengths[0] != version:
            self._lengths = version, sections.lengths(histories, canvas, self._sampling)
        return self._lengths[1]


def _snapshots(run: Run) -> list[Path]:
    return sorted(run.snapshots_path.glob("*.safetensors"))


def _hash(paths: Iterable[Path]) -> str:
    sums = xxhash.xxh3_64()
    for path in paths:
        with suppress(FileNotFoundError):  # a snapshot plan may have removed it
            sums.update(f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}".encode())
    return sums.hexdigest()


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
