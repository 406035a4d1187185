"""edm2 dataset stats: mean and standard deviation of each channel of float data."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from backends.pipeline.data.datasets import Kind, open_dataset
from backends.pipeline.data.statistics import measure, save
from edm2_core.codec import DataFormat


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 dataset stats``."""

    path: tyro.conf.Positional[Path]
    """The data, a folder or a file."""
    data_format: Kind | None = None
    """What they are. Without it: recognised by what is in them."""
    save: bool = False
    """Store the statistics beside the data: training then uses them instead of measuring anew."""


def run(options: Options) -> None:
    """Print the statistics, and store them.

    Raises:
        InputError: as :func:`~backends.pipeline.data.datasets.open_dataset` and
            :func:`~backends.pipeline.data.statistics.measure`.
    """
    items = open_dataset(options.path, kind=options.data_format, format=DataFormat()).items
    measured = measure(items)
    print(f"data      {measured.count} samples of {'x'.join(map(str, measured.shape))}")
    print(f"{'channel':9} {'mean':>12} {'std':>12} {'least':>12} {'greatest':>12}")
    columns = zip(measured.mean, measured.std, measured.least, measured.greatest, strict=True)
    for channel, row in enumerate(columns):
        print(f"{channel:<9} " + " ".join(f"{value:12.5g}" for value in row))
    if options.save:
        print(f"wrote     {save(measured, options.path)}")
