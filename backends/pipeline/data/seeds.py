"""Random streams: the noise and the label of a seed, the same in every port, on every machine and in every batch.

Each stream is a counter-based generator keyed by a seed and a purpose, so a row depends only on its own seed. Seeds are
whole numbers of at most 18 digits.
"""

from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np


def bits(seed: int, purpose: str, step: int = 0, /) -> np.random.Philox:
    """The random bits of a seed for one purpose. ``step`` is the top word of the counter: streams do not overlap."""
    key = np.array([seed, crc32(purpose.encode())], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, step], np.uint64))


def noise(seeds: Sequence[int], shape: Sequence[int], /) -> np.ndarray:
    """The noise that sampling starts from: float32 [n, \\*shape] of N(0, 1), a row per seed."""
    return _normal(seeds, shape, "noise", 0)


def churn_noise(seeds: Sequence[int], shape: Sequence[int], /, *, step: int) -> np.ndarray:
    """The noise that the stochastic sampler adds at a step: float32 [n, \\*shape] of N(0, 1), a row per seed."""
    return _normal(seeds, shape, "churn", step)


def labels(seeds: Sequence[int], label_dim: int, /) -> np.ndarray:
    """A class id for each seed, int64 [n], uniform from 0 to label_dim - 1."""
    return np.array([np.random.Generator(bits(seed, "label")).integers(label_dim) for seed in seeds], np.int64)


def _normal(seeds: Sequence[int], shape: Sequence[int], purpose: str, step: int) -> np.ndarray:
    rows = np.empty((len(seeds), *shape), np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        np.random.Generator(bits(seed, purpose, step)).standard_normal(dtype=np.float32, out=row)
    return rows


# ---- as the official tools draw them


def torch_noise(seeds: Sequence[int], shape: Sequence[int], /) -> np.ndarray:
    """Like :func:`noise`, by a generator of PyTorch on the CPU for each seed modulo 2^32: what published seeds name,
    where the official tools sample on a CPU. CUDA's generators draw other numbers."""
    return np.stack([drawn for drawn, _ in _torch_draws(seeds, shape, 0)])


def torch_labels(seeds: Sequence[int], shape: Sequence[int], label_dim: int, /) -> np.ndarray:
    """Like :func:`labels`: the number that the generator of :func:`torch_noise` draws after the noise."""
    return np.array([label for _, label in _torch_draws(seeds, shape, label_dim)], np.int64)


def _torch_draws(seeds: Sequence[int], shape: Sequence[int], label_dim: int) -> Iterator[tuple[np.ndarray, int]]:
    import torch

    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed % (1 << 32))
        drawn = torch.randn(list(shape), generator=generator).numpy()
        yield drawn, int(torch.randint(label_dim, (), generator=generator)) if label_dim else -1
