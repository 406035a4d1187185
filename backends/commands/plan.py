"""edm2 plan: which averages to store when, so that few files reconstruct any length well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.report.plots import draw_errors, figure, save
from backends.pipeline.runs.options import Location, Text, Whole, choice, count_text, parse_count, quiet, spec
from edm2_core.ema import SnapshotPlan, TimedPlan, plan_snapshots, uniform_plan, worst_error
from edm2_core.network import parameter_count
from edm2_core.presets import preset

_TABLE = (0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    return float(low), float(high)


def _duration(text: str) -> int | None:
    return 0 if text == "any" else parse_count(text)


Range = Annotated[tuple[float, float] | None, spec(_range, "LO-HI", "two lengths such as 0.01-0.25"), quiet]
Duration = Annotated[
    int | None, spec(_duration, "IMAGES", "a whole number of images such as 192Ki or 2Gi, or 'any'"), quiet
]
Size = Annotated[int | None, spec(parse_count, "PARAMETERS", "a whole number such as 280000000"), quiet]
Dtype = Annotated[str | None, choice(*_BYTES), quiet]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the plan command was asked for."""

    files: Whole = None
    """How many files there may be at once. Default: 32."""
    range: Range = None
    """Shortest and longest relative length to be reconstructed. Default: 0.01-0.25."""
    duration: Duration = None
    """Length of the run in images, or 'any' where its end is unknown. Default: the preset's."""
    preset: Text = None
    """Network, for its size, duration and batch. Default: img512-s."""
    parameters: Size = None
    """Size of a network that is none of the presets."""
    batch: Whole = None
    """Images a step. Default: the preset's."""
    max_lengths: Whole = None
    """How many averages may be tracked, each a copy of the network in memory. Default: 3."""
    dtype: Dtype = None
    """How files are stored. Default: float16."""
    out: Location = None
    """Plan to write, with its picture beside it. Default: snapshot-plan.json."""


def run(options: Options) -> None:
    """Print the plan's table, draw its errors, and write it for ``train --snapshot-plan``.

    Raises:
        InputError: as :func:`edm2_core.ema.plan_snapshots`, an unknown preset, or nowhere to write.
    """
    base = preset(options.preset or "img512-s")
    plan = plan_snapshots(
        files=_or(options.files, 32),
        sigma_rel_range=options.range or (0.01, 0.25),
        duration=None if options.duration == 0 else _or(options.duration, base.duration),
        max_lengths=_or(options.max_lengths, 3),
        batch=_or(options.batch, base.batch),
        dtype=options.dtype or "float16",
    )
    usual = {}
    if isinstance(plan, TimedPlan):
        files = _or(options.files, 32)
        usual = {f"uniform, {n} files": uniform_plan(files=n, duration=plan.duration) for n in (files, 4 * files)}
    path = options.out or Path("snapshot-plan.json")
    picture = path.with_suffix(".png")
    drawn, (axes,) = figure(1)
    lengths = np.geomspace(*plan.range, 120)
    draw_errors(
        axes, lengths, {name: p.error(lengths) for name, p in {f"plan, {plan.files} files": plan, **usual}.items()}
    )
    save(drawn, picture)
    write_bytes(path, plan.to_json().encode())
    _say(plan, usual, _or(options.parameters, parameter_count(base.network)))
    print(f"wrote     {path}, for train --snapshot-plan {path}")
    print(f"wrote     {picture}")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _say(plan: SnapshotPlan, usual: dict[str, TimedPlan], parameters: int) -> None:
    each = parameters * _BYTES[plan.dtype]
    print(f"track     {', '.join(f'{s:g}' for s in plan.sigma_rels)}")
    if isinstance(plan, TimedPlan):
        for sigma_rel, times in zip(plan.sigma_rels, plan.times, strict=True):
            first = f", from {count_text(times[0])} to {count_text(times[-1])} images" if times else ""
            print(f"store     {sigma_rel:g} {len(times)} times{first}")
    else:
        print(
            f"store     all whenever the time has grown {plan.ratio:g} times, and at the end; keep the last {plan.kept}"
        )
    plans: dict[str, SnapshotPlan] = {"plan": plan, **usual}
    width = max(map(len, plans))
    print(f"{'':{width}}  files  {'bytes':>8}  worst error")
    for name, one in plans.items():
        shown = worst_error(one) if one is plan else float(one.error(np.geomspace(*plan.range, 49)).total.max())
        print(f"{name:{width}}  {one.files:5}  {_size(one.files * each):>8}  {shown:.4f}")
    lengths = np.array(sorted({*plan.range, *(s for s in _TABLE if plan.range[0] <= s <= plan.range[1])}))
    found = {name: one.error(lengths) for name, one in plans.items()}
    print("length    " + "  ".join(f"{name:>20}" for name in plans) + "   (profile + rounding)")
    for i, length in enumerate(lengths):
        cells = (f"{error.profile[i]:9.4f} +{error.rounding[i]:9.4f}" for error in found.values())
        print(f"{length:<8.3f}  " + "  ".join(f"{cell:>20}" for cell in cells))


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
