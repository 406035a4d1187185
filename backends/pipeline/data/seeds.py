"""What noise and what label does a seed stand for? The same in every port, on every machine, in every batch.

All randomness here comes from counter-based generators that are keyed by a seed and by what is drawn, so a row depends
on its own seed alone. Seeds are whole numbers of at most 18 digits.
"""

import re
from collections.abc import Sequence
from zlib import crc32

import numpy as np

from edm2_core.errors import InputError

_MOST_SEEDS = 10_000_000


def bits(seed: int, purpose: str, step: int = 0, /) -> np.random.Philox:
    """The stream of random bits for one purpose. ``step`` is the top word of its counter, so that no two steps meet."""
    key = np.array([seed, crc32(purpose.encode())], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, step], np.uint64))


def noise(seeds: Sequence[int], shape: Sequence[int], /) -> np.ndarray:
    """Where sampling starts: float32 [n, \\*shape] of N(0, 1), a row per seed."""
    return _normal(seeds, shape, "noise", 0)


def churn_noise(seeds: Sequence[int], shape: Sequence[int], /, *, step: int) -> np.ndarray:
    """What the stochastic sampler adds at one step: float32 [n, \\*shape] of N(0, 1), a row per seed."""
    return _normal(seeds, shape, "churn", step)


def labels(seeds: Sequence[int], label_dim: int, /) -> np.ndarray:
    """A class for each seed, uniform from 0 to label_dim - 1: int64 [n]."""
    return np.array([np.random.Generator(bits(seed, "label")).integers(label_dim) for seed in seeds], np.int64)


def one_hot(labels: np.ndarray, label_dim: int, /) -> np.ndarray:
    """float32 [n, label_dim] with a single 1 per row. Raises InputError for a label that is no class."""
    labels = np.asarray(labels, np.int64)
    if len(outside := labels[(labels < 0) | (labels >= label_dim)]):
        raise InputError(f"a class must be from 0 to {label_dim - 1}, got {outside[0]}: choose one of these")
    return (labels[:, None] == np.arange(label_dim)).astype(np.float32)


def parse_seeds(text: str, /) -> list[int]:
    """The seeds of a list such as ``0-63,70``, in that order; ranges include both ends.

    Raises:
        InputError: the text is no such list, repeats a seed, or names more than ten million.
    """

    def fault(came: str) -> InputError:
        return InputError(f"seeds must be numbers and ranges such as 0-63,70, got {came}: correct the list")

    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if not found:
            raise fault(f"{part!r:.80}" + (f" in {text!r:.80}" if part != text else ""))
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise fault(f"{part.strip()}, which runs backwards")
        if len(seeds) + last - first >= _MOST_SEEDS:
            raise fault(f"more than {_MOST_SEEDS} of them")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise fault(f"{text!r:.80}, which names a seed twice")
    return seeds


def _normal(seeds: Sequence[int], shape: Sequence[int], purpose: str, step: int) -> np.ndarray:
    rows = np.empty((len(seeds), *shape), np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        np.random.Generator(bits(seed, purpose, step)).standard_normal(dtype=np.float32, out=row)
    return rows
