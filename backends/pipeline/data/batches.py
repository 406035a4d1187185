"""Batches of training data, in an order that is a pure function of the seed and of the number of images seen.

Which labels are dropped and which images are flipped are such functions too.

Position p in the endless sequence of samples is place ``p % size`` of the permutation of epoch ``p // size``. So the
order does not depend on batch size, prefetching, or the number of workers or processes, and a run resumes from a
position alone. A batch is handed out as it is stored, 8-bit pixels and class ids: :func:`prepared` makes of it what a
network sees, in any framework, where the batch is then.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

import numpy as np

from edm2_core.arrays import from_host, namespace
from edm2_core.codec import DataFormat, draw_latents
from edm2_core.errors import InputError
from edm2_core.loss import drop_labels

from .datasets import Dataset
from .patience import Unanswered, seconds
from .seeds import bits
from .workers import end_processes, process_pool

_MOST_THREADS = 4
_PART = 256  # the most images that a worker reads at a time
Placed = TypeVar("Placed")


class Batch(NamedTuple):
    """``images`` as stored, uint8 or float32 [n, channels, height, width]; moments have twice as many channels as a
    network sees. ``labels``: class ids, int64 [n], -1 for one that is dropped; vectors, float32 [n, label_dim]; or
    None. ``condition`` as stored, or None. ``flipped``: bool [n], which are mirrored; None: none is."""

    images: Any
    labels: Any = None
    condition: Any = None
    flipped: Any = None


def stored_batch(dataset: Dataset, indices: np.ndarray, /) -> Batch:
    """The samples at ``indices``, with labels and conditions where there are any; of moments, the means."""
    images = dataset.read(indices)
    if dataset.format.codec.stored == "moments":
        images = np.ascontiguousarray(images[:, : dataset.shape[0]])
    labels = dataset.labels(indices) if dataset.label_dim else None
    return Batch(images, labels, dataset.condition(indices) if dataset.cond_channels else None)


def prepared(
    batch: Batch, format: DataFormat, /, *, label_dim: int, channels: int = 1, width: int = 3, normal: Any = None
) -> tuple[Any, Any, Any]:
    """Images, rows of labels [n, label_dim] and condition as a network sees them, float32, in the batch's library.

    ``channels`` and ``width`` are the axes of images. ``normal``, of the shape of the images, is the noise by which
    latents are drawn from moments; None where the batch has no moments. Labels and condition are None where the batch
    has none.
    """

    def image(stored: Any, codec: Any) -> Any:
        values = codec.encode(stored, axis=channels)
        if batch.flipped is None:
            return values
        xp = namespace(values)
        backwards = from_host(np.arange(values.shape[width])[::-1].copy(), like=xp.astype(batch.flipped, xp.int32))
        mirrored = xp.reshape(batch.flipped, (-1, *[1] * (values.ndim - 1)))
        return xp.where(mirrored, xp.take(values, backwards, axis=width), values)

    images = batch.images if normal is None else draw_latents(batch.images, normal, axis=channels)
    condition = None if batch.condition is None else image(batch.condition, cast(Any, format.condition))
    return image(images, format.codec), label_rows(batch.labels, label_dim), condition


def label_rows(labels: Any, label_dim: int, /) -> Any:
    """Class ids [n] as one-hot rows, float32 [n, label_dim], zeros for -1; vectors, and None, as they are."""
    if labels is None or labels.ndim == 2:
        return labels
    xp = namespace(labels)
    return xp.astype(labels[:, None] == from_host(np.arange(label_dim), like=labels), xp.float32)


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


@lru_cache(maxsize=2)
def _flips(size: int, seed: int, epoch: int) -> np.ndarray:
    return (bits(seed, "flip", epoch).random_raw(size) >> np.uint64(63)).astype(bool)


class Reading(NamedTuple):
    """What is read of a dataset: its order's ``seed``, whether labels are read and which share of them is dropped,
    whether half of the images are mirrored, and whether the next sample takes the place of one that cannot be read."""

    dataset: Dataset
    seed: int
    labelled: bool = True
    label_dropout: float = 0.0
    flip: bool = False
    skip_broken: bool = False

    def __call__(self, start: int, count: int) -> Batch:
        """The samples at the positions from ``start`` on."""
        return self.counted(start, count)[0]

    def counted(self, start: int, count: int) -> tuple[Batch, int]:
        """:meth:`__call__`, and in the place of how many samples another was taken."""
        data, part = self.dataset, {"start": start, "count": count, "size": len(self.dataset), "seed": self.seed}
        wanted = sample_indices(**part)
        images, indices = self._images(wanted)
        batch = Batch(
            images,
            self._labels(indices, part) if data.label_dim and self.labelled else None,
            data.condition(indices) if data.cond_channels else None,
            _at_positions(_flips, **part) if self.flip else None,
        )
        return batch, int(np.count_nonzero(indices != wanted))

    def _images(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images at ``indices``, or at those that take their places."""
        try:
            return self.dataset.read(indices), indices
        except InputError:
            if not self.skip_broken:
                raise
        whole = np.array([self._whole(int(index)) for index in indices])
        return self.dataset.read(whole), whole

    def _whole(self, index: int) -> int:
        """The first index from ``index`` on whose sample can be read."""
        size = len(self.dataset)
        for candidate in (*range(index, size), *range(index)):
            try:
                self.dataset.read(np.array([candidate]))
                return candidate
            except InputError as error:
                _say_skipped(str(error))
        raise InputError(
            f"data must have samples that can be read, got none of {size} in {self.dataset.name}: restore them"
        )

    def _labels(self, indices: np.ndarray, part: dict[str, int]) -> np.ndarray:
        labels = self.dataset.labels(indices)
        if not self.label_dropout:
            return labels
        uniform = label_uniforms(**part)
        if self.dataset.vectors:
            return drop_labels(labels, uniform, probability=self.label_dropout)
        return np.where(uniform < self.label_dropout, -1, labels)


@cache
def _say_skipped(error: str) -> None:
    """Once for each sample and process."""
    logging.getLogger("edm2").warning(f"skipped: {error}")


class Batches(Generic[Placed]):
    """An endless iterator over batches, which are read ahead of time.

    Yields what ``place`` makes of a :class:`Batch` of n images, by default the batch itself; it is called in a thread
    of its own, so that copies to a device overlap with training. ``start`` is the number of images seen before. n is
    ``batch``, or ``count`` for a process that trains on the samples from ``offset`` on of each batch: it reads no
    others. An error while reading ahead is raised when its batch is requested, and ends the iteration; so does a batch
    that does not come within :func:`~backends.pipeline.data.patience.seconds`.

    ``workers`` processes read (:func:`~.workers.process_pool`), or threads of this one for 0.
    """

    def __init__(
        self,
        reading: Reading,
        /,
        *,
        start: int,
        batch: int,
        offset: int = 0,
        count: int | None = None,
        prefetch: int = 2,
        workers: int = 0,
        place: Callable[[Batch], Placed] = lambda batch: cast(Any, batch),
    ) -> None:
        self._batch, self._count = batch, batch - offset if count is None else count
        self._next, self._place = start + offset, place
        self._name, self._waits = reading.dataset.name, True
        self.skipped = 0
        """Samples in whose place another was taken, so far as batches have been read."""
        self._readers, self._read = _readers(reading, workers)
        self._gatherer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[Placed]] = deque()
        for _ in range(max(prefetch, workers + 1)):
            self._read_ahead()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Placed:
        if not self._ahead:
            raise StopIteration
        limit = _SHARE * seconds()
        try:
            batch = self._ahead.popleft().result(limit)
        except TimeoutError:
            self._waits = False
            self.close()
            raise Unanswered(
                f"data must be read within {limit:g} s, got no batch of {self._name}: see whether its disk answers, or "
                "give a longer --timeout"
            ) from None
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
        """Stop the workers and the iteration."""
        self._ahead.clear()
        for pool in (self._gatherer, self._readers):
            pool.shutdown(wait=self._waits, cancel_futures=True)
        if not self._waits and isinstance(self._readers, ProcessPoolExecutor):
            end_processes(self._readers)

    def _read_ahead(self) -> None:
        starts = range(self._next, self._next + self._count, _PART)
        end = self._next + self._count
        parts = [self._readers.submit(self._read, start, min(_PART, end - start)) for start in starts]
        self._ahead.append(self._gatherer.submit(self._gathered, parts))
        self._next += self._batch

    def _gathered(self, parts: Sequence[Future[tuple[Batch, int]]]) -> Placed:
        read, skipped = zip(*(part.result() for part in parts), strict=True)
        self.skipped += sum(skipped)
        first, *others = read
        if not others:
            return self._place(first)
        columns = zip(first, *others, strict=True)
        return self._place(Batch(*(None if column[0] is None else np.concatenate(column) for column in columns)))


_SHARE = 0.8  # of the limit: other processes, which wait for this one, hear of it before theirs is over


def _readers(reading: Reading, workers: int) -> tuple[Executor, Callable[[int, int], tuple[Batch, int]]]:
    """A pool of threads or processes, and the function that it runs."""
    if not workers:
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="reader"), reading.counted
    return process_pool(workers, _keep, reading), _in_process


def _keep(reading: Reading) -> None:
    global _reading
    _reading = reading


def _in_process(start: int, count: int) -> tuple[Batch, int]:
    return _reading.counted(start, count)


_reading: Reading
