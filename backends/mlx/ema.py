"""Averages of the weights of any module or tree of arrays; their snapshots; averages of other lengths from these.

    ema = PowerEMA(model)                                     # tracks sigma_rel 0.05 and 0.10
    ema.update(time=images_seen, delta=batch)                 # after each optimizer step
    ema.save("snapshots")                                     # now and then
    model.load_weights(list(reconstruct("snapshots", sigma_rel=0.13).items()))   # after training, any length
    best_length("snapshots", like=model, metric=validation_loss)                 # or the best by your own function

Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from backends.pipeline.checkpoints.averages import save_averages
from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_sources
from backends.pipeline.checkpoints.safetensors_io import BFLOAT16
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.runs.best_length import BestLength
from backends.pipeline.runs.best_length import best_length as best_measured
from edm2_core.ema import Length, LengthLike, StorageDtype, tracking
from edm2_core.ema.clock import start_time, tick
from edm2_core.errors import InputError

from .device import compiled

Tree = Any  # nested dicts and lists of arrays


class PowerEMA:
    """Averages of a module's trainable parameters, or of all arrays of a tree, one per length.

    Time is any whole number you count (images, steps) below 2^53, the same in every call. Frozen parameters of a
    module, such as the statistics of BatchNorm, are not averaged: snapshots hold them as they are. Averages are float32
    where parameters are narrower, and complex64 where they are complex.

    Args:
        model: an ``mlx.nn.Module``; or a tree of arrays, and then :meth:`update` needs the live one each time.
        sigma_rels: relative lengths; ``Length.half_life(time)`` for a traditional average.
        trainable_only: snapshots hold only the parameters that are trainable now, as of a LoRA.
        start: the time at construction. With 0, the first update replaces the averages by the weights: what was before
            does not count, also when weights are fine-tuned. With another time, the weights now count as the average
            until then: an average that goes on from pretraining.

    Raises:
        InputError: a length outside (0, 0.2887), or none; a negative start.
    """

    def __init__(
        self,
        model: nn.Module | Tree,
        *,
        sigma_rels: Sequence[LengthLike] = (0.05, 0.10),
        trainable_only: bool = False,
        start: int = 0,
    ):
        self.time = start_time(start)
        self._module = model if isinstance(model, nn.Module) else None
        self._trainable_only = trainable_only
        weights = _flat(model.trainable_parameters() if isinstance(model, nn.Module) else model)
        averages: Any = tracking.start(weights, sigma_rels=sigma_rels)
        self.averages: dict[Length, dict[str, mx.array]] = {Length.of(s): average for s, average in averages.items()}
        self._advance = compiled(advance)
        mx.eval(self.averages)

    def update(self, params: Tree = None, *, time: int, delta: int) -> None:
        """Advance every average to ``time``, ``delta`` after the last update; any interval is exact. Source: Eq. 127.

        ``params``: the live parameters. Default: those of the module. Evaluates the averages, and with them the live
        parameters, so that no graph grows. Call it after a compiled training step, or put :func:`advance` into one.

        Raises:
            InputError: ``time - delta`` is not the time of the last update, names or shapes that are not averaged, or
                no parameters at all.
        """
        now, live = tick(self.time, time=time, delta=delta), self._live(params)
        tracking.check_alike(self.averages, live)
        shares = mx.array([1 - length.beta(t_next=now, t_delta=now - self.time) for length in self.averages])
        advanced = self._advance(list(self.averages.values()), live, shares)
        self.averages = dict(zip(self.averages, advanced, strict=True))
        del advanced
        mx.eval(self.averages)
        self.time = now

    def _live(self, params: Tree) -> dict[str, mx.array]:
        if params is None and self._module is None:
            raise InputError("update needs the parameters of a tree, got none: call ema.update(params, time=, delta=)")
        if self._module is None:
            return _flat(params)
        averaged = next(iter(self.averages.values()))
        live = _flat(self._module.parameters() if params is None else params)
        return {name: array for name, array in live.items() if name in averaged}  # may have been frozen since

    def arrays(self, length: LengthLike) -> dict[str, mx.array]:
        """One average and the module's frozen parameters, by name, for ``load_weights(list(....items()))``.

        With ``trainable_only`` the frozen ones are missing: ``load_weights(..., strict=False)``.

        Raises:
            InputError: a length that is not tracked.
        """
        length = Length.of(length)
        if length not in self.averages:
            raise InputError(
                f"the length must be one of those tracked, {', '.join(map(str, self.averages))}, got {length}: "
                "reconstruct makes others from saved snapshots"
            )
        frozen = {} if self._module is None or self._trainable_only else _flat(self._module.parameters())
        return {**frozen, **self.averages[length]}

    def save(self, folder: str | Path, *, dtype: StorageDtype = "float16") -> list[Path]:
        """Write one snapshot per average into ``folder``, atomically; returns their paths.

        Averages are stored in ``dtype``, or in float32 where it cannot hold them; all else as it is. Raises InputError
        before the first update, or if weights are not finite.
        """
        first, average = next(iter(self.averages.items()))
        kept = {name: _host(x) for name, x in self.arrays(first).items() if not (name in average and _averaged(x))}
        averages = (
            (length, ((name, _host(x)) for name, x in average.items() if _averaged(x)))
            for length, average in self.averages.items()
        )
        return save_averages(folder, averages, time=self.time, kept=kept, dtype=dtype)

    def state_dict(self) -> dict[str, mx.array]:
        """The clock and the averages, flat, as ``mx.save_safetensors`` takes them."""
        flat = {f"{length.key}/{name}": x for length, average in self.averages.items() for name, x in average.items()}
        return {"time": mx.array(self.time, mx.int64), **flat}

    def load_state_dict(self, state: Mapping[str, mx.array]) -> None:
        """Restore what :meth:`state_dict` returned, also through a file and ``mx.load``.

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
            length: {name: mx.array(state[f"{length.key}/{name}"]).astype(x.dtype) for name, x in average.items()}
            for length, average in self.averages.items()
        }
        mx.eval(self.averages)


def advance(
    averages: Sequence[Mapping[str, mx.array]], weights: Mapping[str, mx.array], shares: mx.array
) -> list[dict[str, mx.array]]:
    """Move each average the part ``shares[i] = 1 - beta`` of the way to ``weights``. Source: Eq. 127.

    A pure function of arrays: put it into a function of your own that ``mx.compile`` compiles, with the shares, which
    change with the clock, as an argument. Shapes: shares [number of averages]. Dtype: floating arrays that of the
    average; others are copied from ``weights``.
    """
    return [
        {name: _lerp(array, weights[name], share) for name, array in average.items()}
        for average, share in zip(averages, shares, strict=True)
    ]


def _lerp(average: mx.array, weight: mx.array, share: mx.array) -> mx.array:
    """``lerp(average, weight, share)``, computed from the closer endpoint so that share 0 and 1 are exact."""
    if not _averaged(average):
        return mx.array(weight)  # of its own: MLX arrays can be written in place
    weight = weight.astype(average.dtype)
    difference = weight - average
    return mx.where(share < 0.5, average + share * difference, weight - (1 - share) * difference)


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None) -> dict[str, mx.array]:
    """The average of length ``sigma_rel`` at ``time``, from the snapshots in ``folder``. Source: Algorithm 3.

    Returns arrays by name, for ``model.load_weights(list(....items()))`` or ``tree_unflatten``: averages in float32 or
    complex64, others as last stored. ``time`` is that of the last snapshot by default.
    """
    (snapshot,) = reconstruct_sources(open_sources(folder), time=time, sigma_rels=[sigma_rel])
    return _arrays(snapshot)


def best_length(
    folder: str | Path,
    *,
    like: nn.Module,
    metric: Callable[[nn.Module], Any],
    sigma_rels: Sequence[float] = (),
    points: int = 9,
    time: int | None = None,
) -> BestLength:
    """The length whose average has the lowest ``metric``, such as a validation loss, and the values of all measured.

    ``metric`` is called with ``like``, which then holds an average, and afterwards its own weights again. It returns a
    number or an array of one element: the negative of what should be high. Other arguments and InputError as
    :func:`~backends.pipeline.runs.best_length.best_length`, and arrays that ``like`` does not have.
    """
    own = _flat(like.parameters())

    def measure(snapshot: Snapshot) -> float:
        weights = _arrays(snapshot)
        for name, array in weights.items():
            if name not in own or own[name].shape != array.shape:
                got = own[name].shape if name in own else "none"
                raise InputError(
                    f"like must have {name} of shape {array.shape}, got {got}: give the module that was averaged"
                )
        like.load_weights(list(weights.items()), strict=False)  # a LoRA's snapshots hold nothing else
        value = metric(like)
        return float(value.item() if hasattr(value, "item") else value)

    try:
        return best_measured(folder, measure, sigma_rels=sigma_rels, points=points, time=time)
    finally:
        like.load_weights(list(own.items()), strict=False)


def _arrays(snapshot: Snapshot) -> dict[str, mx.array]:
    return {name: _device(array) for name, array in snapshot.params.items()}


def _flat(tree: Tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _averaged(x: mx.array) -> bool:
    return bool(mx.issubdtype(x.dtype, mx.inexact))


def _host(x: mx.array) -> np.ndarray:
    """In the dtype of ``x``."""
    return np.array(x.view(mx.uint16)).view(BFLOAT16) if x.dtype == mx.bfloat16 else np.array(x)


def _device(array: np.ndarray) -> mx.array:
    """The inverse of :func:`_host`."""
    return mx.array(array.view(np.uint16)).view(mx.bfloat16) if array.dtype == BFLOAT16 else mx.array(array)
