"""Averages that follow a trainer's count of optimizer steps: what the callbacks of all trainers share."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from backends.torch.ema import PowerEMA
from backends.torch.sharded import is_sharded
from edm2_core.errors import InputError

_LOGGER = logging.getLogger("edm2")


class IntervalEMA:
    """A :class:`~backends.torch.ema.PowerEMA` of the module that a trainer trains, and its snapshots at intervals.

    Time counts optimizer steps. Every process holds the averages: its weights after a step are those of all others, so
    that needs no communication. The first process writes.

    Args:
        folder: where snapshots are written.
        save_every: optimizer steps between snapshots; some 30 in a training are enough. The last step is stored too.
        options: of PowerEMA: ``sigma_rels``, ``trainable_only``, ``device``, ``dtype``.

    Raises:
        InputError: ``save_every`` below 1.
    """

    def __init__(self, folder: str | Path, *, save_every: int, **options: Any) -> None:
        if save_every < 1:
            raise InputError(f"save_every must be 1 optimizer step or more, got {save_every}: try a 30th of all steps")
        super().__init__()
        self.folder, self.save_every, self.options = Path(folder), save_every, options
        self.ema: PowerEMA | None = None
        self._module: nn.Module | None = None
        self._stored = 0

    def begin(self, module: nn.Module, steps: int, state: Mapping[str, Any] | None = None) -> None:
        """Track ``module``, which has been trained for ``steps``; ``state`` is that of the tracker, if one was stored.

        Raises:
            InputError: a state of another step, lengths or parameters; or parameters that are divided among processes.
        """
        if self.ema is not None and self._module is module and 0 < steps == self.ema.time:
            return  # a trainer that goes on
        if _is_divided(module):
            raise InputError(
                "the callback needs whole parameters in each process, got a sharded module: call PowerEMA in a loop of "
                "your own, which follows fully_shard"
            )
        if steps and state is None:
            _LOGGER.warning("no averages are stored with step %d: its weights count as the average until then", steps)
        self.ema, self._module, self._stored = PowerEMA(module, start=steps, **self.options), module, 0
        if state is not None:
            if state["time"] != steps:
                raise InputError(
                    f"averages must be of the step of their checkpoint, got step {state['time']} for {steps}: resume "
                    "another checkpoint"
                )
            self.ema.load_state_dict(dict(state))

    def advance(self, steps: int, *, first: bool) -> None:
        """Update the averages, if there was a step; the ``first`` process stores snapshots when they are due."""
        assert self.ema is not None  # begun
        before = self.ema.time
        if steps > before:
            self.ema.update(time=steps, delta=steps - before)
        if first and steps // self.save_every > before // self.save_every:
            self.store()

    def store(self) -> None:
        """Store snapshots, unless there was no step since the last ones."""
        if self.ema is not None and self.ema.time > self._stored:
            self.ema.save(self.folder)
            self._stored = self.ema.time


def _is_divided(module: nn.Module) -> bool:
    """By fully_shard, by ZeRO-3 of DeepSpeed, or by the first FSDP."""
    parameters = any(is_sharded(p) or hasattr(p, "ds_id") for p in module.parameters())
    return parameters or any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules())
