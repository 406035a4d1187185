"""edm2 plan: chooses which averages to store at which times, so that few files reconstruct any length well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.report.lines import errors
from backends.pipeline.report.plots import draw_lines, figure, save
from backends.pipeline.runs.command_line import count_text, parse_count, reader
from edm2_core.ema import SnapshotPlan, StorageDtype, TimedPlan, plan_snapshots, uniform_plan, worst_error
from edm2_core.errors import InputError
from edm2_core.network import parameter_count
from edm2_core.presets import preset

_TABLE = (0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError as error:
        raise InputError(f"--range must be two lengths such as 0.01-0.25, got {text!r}") from error


def _duration(text: str) -> int | Literal["any"]:
    return "any" if text == "any" else parse_count(text)


Duration = Annotated[
    int | Literal["any"] | None, reader(_duration, "IMAGES", "a whole number of images such as 192Ki or 2Gi, or 'any'")
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 plan``."""

    files: int = 32
    """Maximum number of files at any time."""
    range: str = "0.01-0.25"
    """Shortest and longest relative length to reconstruct."""
    duration: Duration = None
    """Duration of the run in images, or 'any' if its end is unknown. Without it: that of the preset."""
    preset: str = "img512-s"
    """Preset that gives the size of the network, duration and batch."""
    parameters: int | None = None
    """Number of parameters of the network. Without it: that of the preset."""
    batch: int | None = None
    """Images per step. Without it: that of the preset."""
    max_lengths: int = 3
    """Maximum number of averages to track, each a copy of the network in memory."""
    dtype: StorageDtype = "float16"
    """Dtype of the files."""
    out: Path = Path("snapshot-plan.json")
    """File of the plan; its picture is written beside it."""


def run(options: Options) -> None:
    """Make a plan, print its table, draw its errors, and write it for ``train --snapshot-plan``.

    Raises:
        InputError: as :func:`edm2_core.ema.plan_snapshots`, an unknown preset, or a failed write.
    """
    base = preset(options.preset)
    duration = base.hyper.duration if options.duration is None else options.duration
    plan = plan_snapshots(
        files=options.files,
        sigma_rel_range=_range(options.range),
        duration=None if duration == "any" else duration,
        max_lengths=options.max_lengths,
        batch=base.hyper.batch if options.batch is None else options.batch,
        dtype=options.dtype,
    )
    uniform = {}
    if isinstance(plan, TimedPlan):
        counts = (options.files, 4 * options.files)
        uniform = {f"uniform, {n} files": uniform_plan(files=n, duration=plan.duration) for n in counts}
    path, picture = options.out, options.out.with_suffix(".png")
    drawn, (axes,) = figure(1)
    lengths = np.geomspace(*plan.range, 120)
    plans = {f"plan, {plan.files} files": plan, **uniform}
    draw_lines(axes, errors(lengths, {name: one.error(lengths) for name, one in plans.items()}))
    save(drawn, picture)
    write_bytes(path, plan.to_json().encode())
    _print(plan, uniform, parameter_count(base.network) if options.parameters is None else options.parameters)
    print(f"wrote     {path}, for train --snapshot-plan {path}")
    print(f"wrote     {picture}")


def _print(plan: SnapshotPlan, uniform: dict[str, TimedPlan], parameters: int) -> None:
    each = parameters * _BYTES[plan.dtype]
    print(f"track     {', '.join(f'{s:g}' for s in plan.sigma_rels)}")
    if isinstance(plan, TimedPlan):
        for sigma_rel, times in zip(plan.sigma_rels, plan.times, strict=True):
            first = f", from {count_text(times[0])} to {count_text(times[-1])} images" if times else ""
            print(f"store     {sigma_rel:g} {len(times)} times{first}")
    else:
        print(f"store     all whenever time has grown {plan.ratio:g} times, and at the end; keep the last {plan.kept}")
    plans: dict[str, SnapshotPlan] = {"plan": plan, **uniform}
    width = max(map(len, plans))
    print(f"{'':{width}}  files  {'bytes':>8}  worst error")
    for name, one in plans.items():
        worst = worst_error(one) if one is plan else float(one.error(np.geomspace(*plan.range, 49)).total.max())
        print(f"{name:{width}}  {one.files:5}  {_size(one.files * each):>8}  {worst:.4f}")
    lengths = np.array(sorted({*plan.range, *(s for s in _TABLE if plan.range[0] <= s <= plan.range[1])}))
    predicted = {name: one.error(lengths) for name, one in plans.items()}
    print("length    " + "  ".join(f"{name:>20}" for name in plans) + "   (profile + rounding)")
    for i, length in enumerate(lengths):
        cells = (f"{error.profile[i]:9.4f} +{error.rounding[i]:9.4f}" for error in predicted.values())
        print(f"{length:<8.3f}  " + "  ".join(f"{cell:>20}" for cell in cells))


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
