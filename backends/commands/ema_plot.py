"""edm2 ema-plot: what the averages in a folder can be made into, and how well."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.reconstruct import Recipe
from backends.pipeline.report.plots import draw_errors, draw_profiles, figure, save
from backends.pipeline.runs.options import Images, Lengths, Location
from edm2_core.ema import profile, reconstructed_profile, reconstruction_error

from .reconstruct import SourceOptions, open_described

_LENGTHS = (0.02, 0.05, 0.10, 0.20)
_CURVE = np.geomspace(0.01, 0.28, 120)


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """What the ema-plot command was asked for."""

    sigma_rels: Lengths = None
    """Lengths whose profiles are drawn, at most 5. Default: 0.02 0.05 0.1 0.2."""
    at: Images = None
    """Time of the averages, 512Mi say. Default: the last file's."""
    out: Location = None
    """Picture to write. Default: ema.png in the source's folder."""


def run(options: Options) -> None:
    """Draw the picture and print its worst and best. Raises InputError as edm2 reconstruct does."""
    dropped: set[Path] = set()
    sources = open_described(options, dropped)
    recipe = Recipe.of(sources, time=options.at, sigma_rels=options.sigma_rels or _LENGTHS)
    drawn, (left, right) = figure(2)
    t = np.linspace(0, 1, 1001)[1:]
    made = reconstructed_profile(t * recipe.time, **recipe.solved(np.array(recipe.lengths))) * recipe.time
    wanted = [profile(t, end_time=1.0, sigma_rel=s) for s in recipe.lengths]
    draw_profiles(left, t, {s: (w, m) for s, w, m in zip(recipe.lengths, wanted, made, strict=True)})
    error = reconstruction_error(**recipe.solved(_CURVE))
    draw_errors(right, _CURVE, {f"{len(recipe.usable)} files": error})
    path = options.out or options.source / "ema.png"
    save(drawn, path)
    worst = int(np.argmax(error.total))
    print(f"worst     {error.total[worst]:.2e} at {_CURVE[worst]:.3f}, of lengths from {_CURVE[0]:g} to {_CURVE[-1]:g}")
    print(f"wrote     {path}")
