"""edm2 ema-plot: profiles and predicted errors of averages reconstructed from a folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.report.lines import errors
from backends.pipeline.report.plots import draw_lines, draw_profiles, figure, save
from edm2_core.ema import profile, reconstructed_profile, reconstruction_error

from .sources import SourceOptions

_CURVE = np.geomspace(0.01, 0.28, 120)


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Options of ``edm2 ema-plot``."""

    sigma_rels: tuple[float, ...] = (0.02, 0.05, 0.10, 0.20)
    """Lengths whose profiles are drawn, at most 5."""
    at: int | None = None
    """Time of the averages, such as 512Mi. Without it: the time of the last file."""
    out: Path | None = None
    """Picture to write. Without it: ema.png in the source's folder."""


def run(options: Options) -> None:
    """Draw the picture and print the largest error. Raises InputError as edm2 reconstruct does."""
    combination = Combination.of(options.open(), time=options.at, sigma_rels=options.sigma_rels)
    lengths, t = combination.lengths, np.linspace(0, 1, 1001)[1:]
    picture, (left, right) = figure(2)
    reconstructed = reconstructed_profile(t * combination.time, **combination.arguments(lengths)) * combination.time
    wanted = [profile(t, end_time=1.0, sigma_rel=s) for s in lengths]
    draw_profiles(left, t, {s: (w, r) for s, w, r in zip(lengths, wanted, reconstructed, strict=True)})
    error = reconstruction_error(**combination.arguments(_CURVE), dtype=combination.stored_dtype)
    draw_lines(right, errors(_CURVE, {f"{len(combination.usable)} files": error}))
    path = options.out or options.beside("ema.png")
    save(picture, path)
    worst = int(np.argmax(error.total))
    print(f"worst     {error.total[worst]:.2e} at {_CURVE[worst]:.3f}, of lengths from {_CURVE[0]:g} to {_CURVE[-1]:g}")
    print(f"wrote     {path}")
