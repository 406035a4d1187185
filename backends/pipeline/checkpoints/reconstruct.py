"""Reconstruction: averages of any length from stored ones, after training.

Each average is a fixed combination of the stored ones (:mod:`.combination`). All are computed in one pass over blocks
of the arrays: each file is read once, and memory holds a few blocks of each file, whatever the size of the network and
the number of averages. Several threads work on blocks, so that reading and computing overlap. A block is one float32
matrix product on one thread, so the result does not depend on the number of threads.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from edm2_core.ema import Length
from edm2_core.errors import InputError

from .checksums import PIECE
from .combination import Block, Combination, Override, Workspace
from .safetensors_io import BFLOAT16, DTYPES
from .snapshots import Snapshot, with_params
from .sources import Source

GiB = 1 << 30
THREADS = os.cpu_count() or 1
# Least and most elements: blocks are of whole pieces, so that checksums cover them, and do not leave the cache.
_BLOCKS = (PIECE, 1 << 17)
WITHIN = 0.1
"""The largest predicted error, relative to the average, of what is published, or shown without being asked for."""
WORST_ERROR = 0.5
"""Beyond this predicted error, relative to the average, what is made is hardly an average of the length asked for."""
_LOGGER = logging.getLogger("edm2")
_AHEAD = 2  # blocks submitted per thread


def reconstruct(
    sources: Sequence[Source],
    /,
    *,
    time: int | None = None,
    sigma_rels: Sequence[float],
    overrides: Sequence[Override] = (),
    memory: int = GiB,
) -> list[Snapshot]:
    """The averages of the lengths ``sigma_rels`` at ``time`` (None: that of the last source), in that order.

    ``sources`` are those of :func:`~.sources.open_sources`. A stored average is returned as it is stored; others are
    the best fit by all sources up to ``time``, summed in float32 with float64 coefficients rounded to float32.
    ``overrides`` as in :class:`~.combination.Combination`. ``memory`` is the limit in bytes, besides the result.

    Source: arXiv 2312.02696 Algorithm 3.

    Raises:
        InputError: as :meth:`~.combination.Combination.of` and :meth:`~.combination.Combination.compute`.
    """
    return averages(Combination.of(sources, time=time, sigma_rels=sigma_rels, overrides=overrides), memory=memory)


def averages(combination: Combination, /, *, memory: int = GiB) -> list[Snapshot]:
    """The averages of a combination, in the order of its ``sigma_rels``; see :func:`reconstruct`.

    A predicted error above :data:`WORST_ERROR` is logged as a warning.
    """
    for length, error in zip(combination.lengths, combination.error.profile, strict=True):
        if error > WORST_ERROR:
            _LOGGER.warning(
                f"snapshots must be close enough to give an average of sigma_rel {length:g}, got a predicted error of "
                f"{error:.0%}: choose another length, or store averages more often"
            )
    entries = combination.entries.items()
    dtypes = {name: np.float32 if combination.averaged(name) else DTYPES[entry.dtype] for name, entry in entries}
    results = [{name: np.empty(entry.shape, dtypes[name]) for name, entry in entries} for _ in combination.sigma_rels]

    def store(block: Block, values: np.ndarray) -> None:
        for params, row in zip(results, values, strict=True):
            params[block.name].reshape(-1)[block.start : block.stop] = row

    for _ in compute_blocks(combination, store, memory=memory):
        pass
    for params in results:
        exact = {name: params[name].view(BFLOAT16) for name, entry in entries if entry.dtype == "BF16"}
        params |= {name: array for name, array in exact.items() if not combination.averaged(name)}
    of_latest = replace(combination.latest.metadata, nimg=combination.time)
    return [
        with_params(replace(of_latest, length=Length.of(sigma_rel)), params)
        for params, sigma_rel in zip(results, combination.sigma_rels, strict=True)
    ]


def compute_blocks(
    combination: Combination, consume: Callable[[Block, np.ndarray], None], /, *, memory: int = GiB, skip: int = 0
) -> Iterator[int]:
    """Compute all blocks but the first ``skip``; yield the number of elements of each, in order.

    ``consume`` gets the values of a block, [n_out, elements]; it is called from several threads, once per block.

    Raises:
        InputError: as :func:`block_size`, :meth:`~.combination.Combination.compute` and ``consume``.
    """
    size = block_size(combination, memory=memory)
    workspace = Workspace()

    def work(block: Block) -> int:
        consume(block, combination.compute(block, workspace))
        return block.stop - block.start

    submitted: deque[Future[int]] = deque()
    with threadpool_limits(1), ThreadPoolExecutor(THREADS) as pool:
        try:
            for index, block in enumerate(combination.blocks(size)):
                if index < skip:
                    continue
                submitted.append(pool.submit(work, block))
                if len(submitted) >= _AHEAD * THREADS:
                    yield submitted.popleft().result()
            while submitted:
                yield submitted.popleft().result()
        finally:
            for future in submitted:
                future.cancel()


def block_size(combination: Combination, *, memory: int) -> int:
    """Elements of a block, a power of 2, so that all blocks in work fit into ``memory`` bytes.

    Raises:
        InputError: not even the smallest fits.
    """
    files, outputs = len(combination.usable), len(combination.sigma_rels)
    element = 8 * files + 12 * outputs  # bytes: stored and in float32; the sum, a copy, rounded
    least, most = _BLOCKS
    fitting = memory // (element * THREADS)
    if fitting < least:
        raise InputError(
            f"memory for {files} files and {outputs} averages must be at least {least * element * THREADS} bytes, "
            f"got {memory}: give more, or want fewer at a time"
        )
    return min(most, 1 << (fitting.bit_length() - 1))
