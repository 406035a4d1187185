"""edm2 sweep: which averaging length, guidance weight or other setting makes the best images, by any metric.

Each point is measured once and kept in the run's figures.jsonl, so an interrupted sweep goes on where it was, and
another search uses what is known. Several processes, started by torchrun for example, divide the images of each point.

With ``--metric MODULE:FUNCTION`` it is the length of averages of any model, in a folder of snapshots: the function gets
the weights by name, NumPy arrays, and returns a number, the lower the better.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Annotated, Any, Literal

from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.remote import is_url, local, url_of
from backends.pipeline.checkpoints.sources import Source, open_sources
from backends.pipeline.report.lines import swept
from backends.pipeline.report.plots import draw_lines, draw_map, figure, save
from backends.pipeline.runs.best_length import checked, own_metric, reachable
from backends.pipeline.runs.command_line import flag, reader
from backends.pipeline.runs.evaluation import FIGURES, Measure, append_figures, described, generated, read_figures
from backends.pipeline.runs.folder import Run, newest
from backends.pipeline.runs.networks import FoundNetwork
from backends.pipeline.runs.options import SamplingOptions
from backends.pipeline.runs.sampling import job_of
from backends.pipeline.runs.sweeping import Domain, Point, Search, search
from edm2_core.errors import InputError

_LENGTH = "sigma-rel"
_INTERVAL = {"guide-lowest": 0, "guide-highest": 1}
Vary = Annotated[
    tuple[Domain, ...],
    reader(Domain.of, "NAME=DOMAIN [...]", "NAME=LOW:HIGH or NAME=A,B,C, such as sigma-rel=0.03:0.25", nargs="*"),
]


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Options of ``edm2 sweep``: those of sampling, for all that is not varied, and these."""

    vary: Vary = (Domain("sigma-rel", (), 0.03, 0.25),)
    """What is varied, as a range or values: sigma-rel, guide-sigma-rel, guidance, guide-lowest, guide-highest, another
    number of the options of sampling, or a pattern of weights such as 'unet.enc.*', whose averages then have their own
    length."""
    search: Search = "auto"
    """grid; golden, for one range; gp, a Gaussian process. auto: golden for one range, gp for several, else grid."""
    points: int = 7
    """The most points that golden and gp measure."""
    grid: int = 9
    """Values of each range in a grid."""
    metric: str = "fid"
    """The metric, as in edm2 evaluate; of precision-recall and is the highest is the best, else the lowest. Or
    MODULE:FUNCTION of the weights of any model, from arrays by name to a number; --run is then any folder of them."""
    reference: str | None = None
    """Data, or a file of statistics. Without it: the data of the run."""
    seeds: str = "0-9999"
    """Seeds of the images of each point."""
    weights: str | None = None
    """Weights of the extractor. Without it: the published ones, which are downloaded."""
    port: Literal["torch", "jax", "mlx"] = "torch"
    """Port that samples."""


def run(options: Options) -> None:
    """Print a line for each point, the best as a command, and draw the figures in the run.

    Raises:
        InputError: no run, something else than a sampling option to vary, or as evaluating or :func:`sweep_function`.
    """
    if ":" in options.metric and "@" not in options.metric:
        sweep_function(options)
        return
    sweep = Sweep.of(options)
    say = sweep.measure.team.say
    say(f"run      {sweep.run.address}, {options.metric} of seeds {options.seeds}")
    say("  ".join(f"{domain.name:>10}" for domain in options.vary) + f"  {options.metric:>12}")
    measured: dict[Point, float] = {}
    (metric,) = sweep.measure.metrics

    def ask(point: Point) -> float:
        value, known = sweep.figure(point)
        measured[point] = value
        row = "  ".join(f"{x:10.4g}" for x in point)
        say(f"{row}  {value:12.6g}{'  (known)' if known else ''}")
        return metric.loss(value)

    search(options.vary, ask, kind=options.search, points=options.points, grid=options.grid)
    best = min(measured, key=lambda point: (metric.loss(measured[point]), point))
    names = [domain.name for domain in options.vary]
    say(f"best     {', '.join(f'{n} {x:g}' for n, x in zip(names, best, strict=True))}: {measured[best]:.6g}")
    say(f"next     {sweep.command(best)}")
    if sweep.measure.team.rank == 0:
        path = sweep.run.notes_path / f"sweep-{options.metric.replace(':', '-')}.png"
        drawn, (axes,) = figure(1)
        if len(names) == 1:
            draw_lines(axes, swept(names[0], measured, metric.main, best=best))
        else:
            draw_map(axes, names, measured, metric.main, best=best)
        save(drawn, path)
        say(f"wrote    {path}")


def sweep_function(options: Options) -> None:
    """Print the value of each length of the averages in a folder by the user's own function, and the best as a command.

    Raises:
        InputError: no folder, something else than lengths to vary, or as :func:`own_metric`, :func:`reachable`.
    """
    folder = options.run or options.net
    if folder is None:
        raise InputError("sweep by a function of the weights needs a folder, got none: give --run FOLDER of snapshots")
    _check(options.vary)
    domains = [domain for domain in options.vary if domain.name == _LENGTH or _is_pattern(domain.name)]
    if len(domains) < len(options.vary):
        raise InputError(
            f"--metric {options.metric} is of weights alone, got --vary {' '.join(map(str, options.vary))}: vary "
            "sigma-rel or patterns of weights"
        )
    measure, sources, measured = own_metric(options.metric), open_sources(folder), dict[Point, float]()
    names = [domain.name for domain in domains]
    print("  ".join(f"{name:>10}" for name in names) + f"  {options.metric:>12}")

    def lengths(point: Point) -> tuple[float, list[tuple[str, float]]]:
        groups = dict(zip(names, point, strict=True))
        return groups.pop(_LENGTH, options.sigma_rel or 0.10), list(groups.items())

    def ask(point: Point) -> float:
        length, groups = lengths(point)
        reachable(sources, [length])
        (snapshot,) = reconstruct(sources, sigma_rels=[length], overrides=groups)
        measured[point] = checked(measure(snapshot), length)
        print("  ".join(f"{x:10.4g}" for x in point) + f"  {measured[point]:12.6g}", flush=True)
        return measured[point]

    search(domains, ask, kind=options.search, points=options.points, grid=options.grid)
    best = min(measured, key=lambda point: (measured[point], point))
    length, groups = lengths(best)
    override = "".join(f" '{name}={x:g}'" for name, x in groups)
    print(f"best     {', '.join(f'{n} {x:g}' for n, x in zip(names, best, strict=True))}: {measured[best]:.6g}")
    print(f"next     edm2 reconstruct {folder} --sigma-rels {length:g}{' --override' if groups else ''}{override}")


@dataclass(frozen=True)
class Sweep:
    """Measures points of a run."""

    options: Options
    run: Run
    sources: Sequence[Source]
    measure: Measure
    port: Any

    @classmethod
    def of(cls, options: Options) -> "Sweep":
        _check(options.vary)
        port = import_module(f"backends.{options.port}.sample")
        path = options.run or options.net
        path = newest(train=f"python -m backends.{options.port}.train") if path is None else path
        run = Run(local(path))
        run.url = url_of(path) if is_url(path) else None
        config = run.config()
        sources = run.snapshots(config.network)
        if not sources:
            raise InputError(f"a run must have snapshots to choose from, got none in {run.path}: train it longer")
        measure = Measure.of(
            [options.metric],
            reference=options.reference or config.data,
            weights=options.weights,
            device=options.device,
            team=port.open_team(options.device),
        )
        return cls(options, run, sources, measure, port)

    def figure(self, point: Point, /) -> tuple[float, bool]:
        """The figure of a point, and whether it was known."""
        options, lengths = self._at(point)
        job = job_of(options, self._network(options, lengths))
        (metric,) = self.measure.metrics
        known = described(options, job, self.options.reference or self.run.config().data)
        known |= {"metric": metric.name, **self.measure.conditions(metric)}
        known = json.loads(json.dumps(known))  # as it is read back
        path = self.run.notes_path / FIGURES
        for line in read_figures(path):
            if all(line.get(name) == value for name, value in known.items()):
                return float(line["figures"][metric.main]), True
        made = self.measure.statistics(generated(options, job, self.port, self.measure.team))
        (line,) = self.measure.figures(made)
        if self.measure.team.rank == 0:
            point_text = {d.name: x for d, x in zip(self.options.vary, point, strict=True)}
            append_figures(path, [line | known | {"point": point_text}])
        return float(line["figures"][metric.main]), False

    def _at(self, point: Point) -> tuple[SamplingOptions, list[tuple[str, float]]]:
        """The options of sampling at a point, and lengths of groups of weights."""
        mine = {f.name: getattr(self.options, f.name) for f in fields(SamplingOptions)}
        options, lengths = SamplingOptions(**mine | {"run": None, "net": self.run.path}), []
        for domain, value in zip(self.options.vary, point, strict=True):
            if _is_pattern(domain.name):
                lengths.append((domain.name, value))
            elif domain.name in _INTERVAL:
                interval = list(options.guide_interval)
                interval[_INTERVAL[domain.name]] = value
                options = replace(options, guide_interval=(interval[0], interval[1]))
            else:
                field = domain.name.replace("-", "_")
                kind = type(getattr(options, field))
                changed: Any = {field: int(value) if kind is int else value}
                options = replace(options, **changed)
        return options, lengths

    def _network(self, options: SamplingOptions, lengths: Sequence[tuple[str, float]]) -> FoundNetwork:
        length = 0.10 if options.sigma_rel is None else options.sigma_rel
        (snapshot,) = reconstruct(self.sources, sigma_rels=[length], overrides=lengths)
        return FoundNetwork(snapshot, self.run.address, self.run.samples_path, self.run)

    def command(self, best: Point, /) -> str:
        """The command that samples with the best setting."""
        options, lengths = self._at(best)
        words, usual = [], SamplingOptions()
        for field in fields(SamplingOptions):
            value = getattr(options, field.name)
            if field.name not in ("run", "net", "seeds") and value != getattr(usual, field.name):
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"{flag(field.name)} {text}")
        if lengths:
            groups = " ".join(f"'{name}={value:g}'" for name, value in lengths)
            length = 0.10 if options.sigma_rel is None else options.sigma_rel
            made = f"edm2 reconstruct {self.run.address} --sigma-rels {length:g} --override {groups}"
            return f"{made}; sample with its --net"
        return " ".join([f"python -m backends.{self.options.port}.sample --net {self.run.address}", *words])


def _check(vary: Sequence[Domain]) -> None:
    numbers = {f.name for f in fields(SamplingOptions) if isinstance(getattr(SamplingOptions(), f.name), int | float)}
    allowed = {name.replace("_", "-") for name in numbers - {"batch"}} | {_LENGTH, "guide-sigma-rel", *_INTERVAL}
    if not vary:
        raise InputError("--vary must name what is varied, got nothing: sigma-rel=0.03:0.25 is usual")
    for domain in vary:
        if domain.name not in allowed and not _is_pattern(domain.name):
            raise InputError(
                f"--vary must be of {', '.join(sorted(allowed))} or a pattern of weights, got {domain.name!r}"
            )
    if len({domain.name for domain in vary}) < len(vary):
        raise InputError(f"--vary must name each thing once, got {' '.join(map(str, vary))}")


def _is_pattern(name: str) -> bool:
    return "." in name or "*" in name
