"""Batches of training images, in an order that is a pure function of the seed and of the number of images seen.

Which labels are dropped is such a function too.

Position p in the endless sequence of samples is place ``p % size`` of the permutation of epoch ``p // size``. So the
order does not depend on batch size, prefetching or the number of processes, and a run resumes from a position alone.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Self

import numpy as np

from edm2_core.loss import drop_labels

from .datasets import Dataset, to_model
from .labels import one_hot
from .seeds import bits

Batch = tuple[np.ndarray, np.ndarray | None]


def sample_indices(*, start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Indices, int64 [count], of the samples at positions ``start`` to ``start + count - 1`` (``count`` at least 1)."""
    return _at_positions(_permutation, start, count, size, seed)


def label_uniforms(*, start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Numbers within [0, 1), float64 [count], of the samples at these positions: labels whose number is below the
    probability are dropped. Source: SPEC LOSS-4."""
    return _at_positions(_uniforms, start, count, size, seed)


def _at_positions(
    of_epoch: Callable[[int, int, int], np.ndarray], start: int, count: int, size: int, seed: int
) -> np.ndarray:
    epochs = range(start // size, -(-(start + count) // size))
    skipped = start - epochs.start * size
    return np.concatenate([of_epoch(size, seed, epoch) for epoch in epochs])[skipped : skipped + count]


@lru_cache(maxsize=2)  # a batch usually lies within one epoch, or within two
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order that sorts raw Philox words: NumPy versions may differ in ``Generator.permutation``, not in these."""
    return np.argsort(bits(seed, "order", epoch).random_raw(size), kind="stable")


@lru_cache(maxsize=2)
def _uniforms(size: int, seed: int, epoch: int) -> np.ndarray:
    return (bits(seed, "label dropout", epoch).random_raw(size) >> np.uint64(11)) * 2.0**-53


class Batches:
    """An endless iterator over batches, which a thread reads ahead of time.

    Yields images, float32 [n, channels, resolution, resolution] from -1 to 1, and one-hot labels, float32 [n,
    label_dim], or None where the dataset has none; the row of a label that is dropped, with probability
    ``label_dropout``, is 0. ``start`` is the number of images seen before. n is ``batch``, or
    ``count`` for a process that trains on the samples from ``offset`` on of each batch. An error while reading ahead
    is raised when its batch is requested, and ends the iteration.
    """

    def __init__(
        self,
        dataset: Dataset,
        /,
        *,
        start: int,
        batch: int,
        seed: int,
        offset: int = 0,
        count: int | None = None,
        label_dropout: float = 0.0,
        prefetch: int = 2,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._batch = batch
        self._label_dropout = label_dropout
        self._count = batch - offset if count is None else count
        self._next = start + offset
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(max(prefetch, 1)):
            self._read_ahead()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._read_ahead()
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and the iteration."""
        self._ahead.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        self._ahead.append(self._thread.submit(self._read, self._next))
        self._next += self._batch

    def _read(self, start: int) -> Batch:
        data = self._dataset
        part = {"start": start, "count": self._count, "size": len(data), "seed": self._seed}
        indices = sample_indices(**part)
        return to_model(data.images(indices)), self._labels(indices, part)

    def _labels(self, indices: np.ndarray, part: dict[str, int]) -> np.ndarray | None:
        if not self._dataset.label_dim:
            return None
        labels = one_hot(self._dataset.labels(indices), self._dataset.label_dim)
        if not self._label_dropout:
            return labels
        return drop_labels(labels, label_uniforms(**part), probability=self._label_dropout)
