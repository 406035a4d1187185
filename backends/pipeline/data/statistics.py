"""Mean and standard deviation of each channel of float data, measured in one stream.

They are kept beside the data where ``edm2 dataset stats --save`` wrote them, and with each run.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.pipeline.checkpoints.atomic import write_bytes
from edm2_core.codec import Codec
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

_AT_A_TIME = 1 << 24  # bytes


class Items(Protocol):
    """Stored samples, without labels: ``shape`` is theirs, ``where`` says where one is stored."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...
    def where(self, index: int, /) -> str: ...
    def read(self, indices: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Statistics:
    """Of ``count`` samples of ``shape``, by channel: mean, standard deviation, least and greatest value."""

    count: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    least: tuple[float, ...]
    greatest: tuple[float, ...]

    @property
    def codec(self) -> Codec:
        """The codec that standardizes such data. Raises InputError for a channel that never changes."""
        if still := [str(channel) for channel, std in enumerate(self.std) if not std > 0]:
            raise InputError(
                f"each channel must vary, got the same value everywhere in channel {', '.join(still)}: leave it out"
            )
        return Codec.standardizing(self.mean, self.std)


def measure(items: Items, /) -> Statistics:
    """The statistics of all of ``items``.

    Sums are in float64, of differences from the first sample's means, so that a large mean costs no digits.

    Raises:
        InputError: a value that is not finite, named by file and place.
    """
    channels = items.shape[0]
    shift = items.read(np.array([0])).astype(np.float64).mean(axis=(0, 2, 3))
    total, squares = np.zeros(channels), np.zeros(channels)
    least, greatest = np.full(channels, np.inf), np.full(channels, -np.inf)
    for indices in _parts(items):
        values = items.read(indices)
        _check_finite(items, indices, values)
        off = values.astype(np.float64) - shift[:, None, None]
        total += off.sum(axis=(0, 2, 3))
        squares += np.square(off).sum(axis=(0, 2, 3))
        least, greatest = (
            np.minimum(least, values.min(axis=(0, 2, 3))),
            np.maximum(greatest, values.max(axis=(0, 2, 3))),
        )
    count = len(items) * int(np.prod(items.shape[1:]))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    columns = (mean + shift, std, least, greatest)
    return Statistics(len(items), items.shape, *(tuple(map(float, column)) for column in columns))


def _parts(items: Items) -> Iterator[np.ndarray]:
    some = max(1, _AT_A_TIME // (4 * int(np.prod(items.shape))))
    for start in range(0, len(items), some):
        yield np.arange(start, min(start + some, len(items)))


def _check_finite(items: Items, indices: np.ndarray, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    sample, channel, row, column = np.argwhere(~finite)[0]
    raise InputError(
        f"data must be finite, got {values[sample, channel, row, column]} in {items.where(int(indices[sample]))}, "
        f"channel {channel}, row {row}, column {column}: replace it, or leave the sample out"
    )


def stored_path(data: Path, /) -> Path:
    """The file beside ``data`` that holds its statistics."""
    return data.with_name(f"{data.name}.stats.json")


def save(statistics: Statistics, data: Path, /) -> Path:
    """Store ``statistics`` beside the data."""
    path = stored_path(data)
    write_bytes(path, (json.dumps(asdict(statistics), indent=1) + "\n").encode())
    return path


def standardized(items: Items, data: Path, /) -> Codec:
    """The codec that standardizes ``items``: by the statistics stored beside ``data``, or measured now.

    Raises:
        InputError: as :func:`measure`; or stored statistics of other data.
    """
    path = stored_path(data)
    if not path.exists():
        return measure(items).codec
    try:
        values: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        stored = Statistics(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} must be what edm2 dataset stats wrote, got '{error}': remove it, or measure again"
        ) from error
    if (stored.count, stored.shape) != (len(items), tuple(items.shape)):
        raise InputError(
            f"statistics must be those of the data, {len(items)} of {list(items.shape)}, got {stored.count} of "
            f"{list(stored.shape)} in {path}: measure again with edm2 dataset stats {data} --save"
        )
    return stored.codec
