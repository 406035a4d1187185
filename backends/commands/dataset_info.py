"""edm2 dataset info: what a dataset was recognised as."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from backends.pipeline.data.batches import prepared, stored_batch
from backends.pipeline.data.datasets import Kind, StoredDataset, open_dataset
from backends.pipeline.runs.pictures import save_grid, visible

_SHOWN, _SAMPLE = 64, 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 dataset info``."""

    path: tyro.conf.Positional[str]
    """The data: digits, a folder, or a file."""
    data_format: Kind | None = None
    """What they are. Without it: recognised by what is in them."""
    condition: str | None = None
    """Data of which each sample is the condition of one."""
    picture: Path | None = None
    """PNG of 64 samples to write."""


def run(options: Options) -> None:
    """Print count, shape, codec, labels and means, and write the picture.

    Raises:
        InputError: as :func:`~backends.pipeline.data.datasets.open_dataset`.
    """
    data = open_dataset(options.path, kind=options.data_format, condition=options.condition)
    codec, (channels, height, width) = data.format.codec, data.shape
    stored = {"uint8": "8-bit images", "float32": "floats", "moments": "moments of latents"}[codec.stored]
    print(f"data      {data.spec}: {len(data)} samples, {stored}")
    print(f"shape     {width}x{height} with {channels} channels")
    if data.cond_channels:
        print(f"condition {data.cond_channels} channels")
    if codec.stored != "uint8":
        print(f"codec     mean {_numbers(codec.mean)}, scale {_numbers(codec.scale)}")
    if codec.vae:
        print(f"encoder   {codec.vae}")
    for line in _labels(data):
        print(line)
    some = np.linspace(0, len(data) - 1, min(len(data), _SAMPLE)).astype(np.int64)
    images, _, _ = prepared(stored_batch(data, some), data.format, label_dim=data.label_dim)
    print(f"network   sees mean {_numbers(images.mean(axis=(0, 2, 3)))}, std {_numbers(images.std(axis=(0, 2, 3)))}")
    if options.picture is not None:
        shown = images[np.linspace(0, len(images) - 1, min(len(images), _SHOWN)).astype(int)]
        save_grid(options.picture, visible(shown, data.format))
        print(f"wrote     {options.picture}")


def _labels(data: StoredDataset) -> list[str]:
    if not data.label_dim:
        return ["labels    none"]
    if data.vectors:
        return [f"labels    vectors of length {data.label_dim}"]
    counts = np.bincount(data.labels(np.arange(len(data))), minlength=data.label_dim)
    names = data.format.classes or tuple(map(str, range(data.label_dim)))
    each = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    shown = ", ".join(each[:20]) + (f", and {len(each) - 20} more" if len(each) > 20 else "")
    return [f"labels    {data.label_dim} classes: {shown}"]


def _numbers(values: object) -> str:
    array = np.atleast_1d(np.asarray(values, np.float64))
    text = " ".join(f"{value:.4g}" for value in array[:8])
    return text + (" ..." if len(array) > 8 else "")
