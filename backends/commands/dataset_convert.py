"""edm2 dataset convert: makes a training set of pictures of any kind and size."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from backends.pipeline.data.convert import convert, open_source
from backends.pipeline.data.transforms import Settings, Transform
from backends.pipeline.runs.command_line import reader
from backends.pipeline.runs.progress import Progress


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]), int(match[2] or match[1])


Size = Annotated[tuple[int, int] | None, reader(_size, "WxH", "a width and a height such as 64x64", optional=True)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 dataset convert``."""

    source: tyro.conf.Positional[Path]
    """Folder, .zip or .tar of pictures, or a table of Hugging Face; folders of pictures are classes."""
    dest: tyro.conf.Positional[Path]
    """Training set to write: a .zip, or a folder."""
    resolution: Size = None
    """Width and height of the output, such as 64x64. Without it: all pictures must have one size."""
    transform: Transform | None = None
    """How pictures get that size: center-crop cuts to its shape; center-crop-wide also pads that to a square with
    black; center-crop-dhariwal is ADM's; fit pads with the background."""
    background: str = "black"
    """Colour beneath transparent pixels, and around fitted pictures."""
    grey: bool = False
    """One channel instead of three."""
    max_images: int | None = None
    """Convert the first ones only, by name."""
    workers: int = os.cpu_count() or 1
    """Processes that decode."""
    skip_broken: bool = False
    """Leave out pictures that are broken or of another size, and name them."""


def run(options: Options) -> None:
    """Write the set and say what is in it.

    Raises:
        InputError: as :func:`~backends.pipeline.data.convert.convert`.
    """
    settings = Settings(
        size=options.resolution, transform=options.transform, grey=options.grey, background=options.background
    )
    source = open_source(options.source, max_images=options.max_images)
    with Progress(total=len(source.indices)) as progress:
        made = convert(
            source,
            options.dest,
            settings,
            workers=options.workers,
            skip_broken=options.skip_broken,
            progress=progress.done,
        )
    labels = source.labels
    kind = "" if labels is None else f", {labels.dim} classes" if labels.values.ndim == 1 else ", label vectors"
    print(f"wrote     {options.dest}: {made.count} images{kind}")
    if made.faults:
        named = "; ".join(f"{fault.name} {fault.reason}" for fault in made.faults[:10])
        print(f"left out  {len(made.faults)}: {named}{'; ...' if len(made.faults) > 10 else ''}")
