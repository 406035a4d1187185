"""Averages of any module or tree of arrays, snapshots of them, and any other length afterwards.

    ema = PowerEMA(model)                                     # tracks sigma_rel 0.05 and 0.10
    ema.update(time=images_seen, delta=batch)                 # after each optimizer step
    ema.save("snapshots")                                     # now and then
    model.load_weights(list(reconstruct("snapshots", sigma_rel=0.13).items()))   # after training, any length

Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_arrays
from backends.pipeline.checkpoints.snapshots import save_averages
from edm2_core.ema.tracking import advance, start
from edm2_core.errors import InputError

Tree = Any  # nested dicts and lists of arrays


class PowerEMA:
    """Averages of a module's trainable parameters, or of all arrays of a tree, one per length.

    The clock is whatever whole number you count (images, steps), the same in every call. What is frozen in a module,
    such as the statistics of BatchNorm, is not averaged: snapshots hold it as it is. Averages stay float32 where
    parameters are narrower.

    Args:
        model: an ``mlx.nn.Module``; or a tree, and then :meth:`update` is given what is to be averaged.
        sigma_rels: relative lengths; ``HalfLife(images)`` for a traditional average.
        trainable_only: snapshots hold nothing but the parameters that can be trained now, as of a LoRA.

    Raises:
        InputError: a length outside (0, 0.2887), or none.
    """

    def __init__(
        self,
        model: nn.Module | Tree,
        *,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        trainable_only: bool = False,
    ):
        self.time = 0
        self._module = model if isinstance(model, nn.Module) else None
        self._trainable_only = trainable_only
        weights = _flat(model.trainable_parameters() if isinstance(model, nn.Module) else model)
        self.averages: dict[float, dict[str, mx.array]] = start(weights, sigma_rels=sigma_rels)
        mx.eval(self.averages)

    def update(self, params: Tree = None, *, time: int, delta: int) -> None:
        """Advance every average to ``time``, ``delta`` after the last update; any interval is exact (Eq. 127).

        ``params``: the live parameters, None: those of the module. Evaluates them and the averages, so that no graph
        grows.

        Raises:
            InputError: unless 0 < delta <= time, names or shapes that are not averaged, or no parameters at all.
        """
        self.averages = advance(self.averages, self._live(params), t_next=time, t_delta=delta)
        mx.eval(self.averages)
        self.time = time

    def _live(self, params: Tree) -> dict[str, mx.array]:
        if params is None and self._module is None:
            raise InputError("update needs the parameters of a tree, got none: call ema.update(params, time=, delta=)")
        if self._module is None:
            return _flat(params)
        averaged = next(iter(self.averages.values()))
        live = _flat(self._module.parameters() if params is None else params)
        return {name: array for name, array in live.items() if name in averaged}  # may have been frozen since

    def arrays(self, sigma_rel: float) -> dict[str, mx.array]:
        """One average and what is frozen in the module, by name: what ``load_weights(list(....items()))`` takes.

        Those of ``trainable_only`` are fewer: ``load_weights(..., strict=False)``. Raises InputError for a length that
        is not tracked.
        """
        if sigma_rel not in self.averages:
            raise InputError(
                f"the length must be one of those tracked, {', '.join(map(str, self.averages))}, got {sigma_rel}: "
                "reconstruct makes others from what was saved"
            )
        besides = {} if self._module is None or self._trainable_only else _flat(self._module.parameters())
        return {**besides, **self.averages[sigma_rel]}

    def save(self, folder: str | Path) -> list[Path]:
        """Write one snapshot per average into ``folder``, atomically; returns their paths."""
        averages = ((s, {name: _host(x) for name, x in self.arrays(s).items()}) for s in self.averages)
        return save_averages(folder, averages, time=self.time)

    def state_dict(self) -> dict[str, mx.array]:
        """Everything needed to go on, the clock and the averages, flat: ``mx.save_safetensors`` takes it."""
        flat = {f"{s!r}/{name}": array for s, average in self.averages.items() for name, array in average.items()}
        return {"time": mx.array(self.time, mx.int64), **flat}

    def load_state_dict(self, state: Mapping[str, mx.array]) -> None:
        """Restore ``state_dict()``, or what ``mx.load`` makes of it.

        Raises:
            InputError: other lengths, names or shapes; nothing is changed then.
        """
        ours, theirs = ({name: x.shape for name, x in s.items()} for s in (self.state_dict(), state))
        if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            raise InputError(
                f"state must track the same lengths and parameters, got {odd[0]} {theirs.get(odd[0], 'missing')} for "
                f"{ours.get(odd[0], 'none')}: build PowerEMA with the model and sigma_rels that it was saved with"
            )
        self.time = int(np.array(state["time"]))
        self.averages = {
            s: {name: mx.array(state[f"{s!r}/{name}"]).astype(x.dtype) for name, x in average.items()}
            for s, average in self.averages.items()
        }
        mx.eval(self.averages)


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None) -> dict[str, mx.array]:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns arrays by name, for ``model.load_weights(list(....items()))`` or ``tree_unflatten``: averages in float32,
    counters as last stored. Source: Algorithm 3.
    """
    (snapshot,) = reconstruct_arrays(folder, nimg=time, sigma_rels=[sigma_rel])
    return {name: mx.array(array) for name, array in snapshot.params.items()}


def moved(average: mx.array, weight: mx.array, share: mx.array) -> mx.array:
    """From ``average`` the part ``share`` (1 - beta, 0-d) of the way to ``weight``, measured from the nearer end: exact
    at both. What a compiled step does, where ``share`` is no Python number. Source: Eq. 127."""
    way = weight - average
    return mx.where(share < 0.5, average + share * way, weight - (1 - share) * way)


def _flat(tree: Tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _host(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
