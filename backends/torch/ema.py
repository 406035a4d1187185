"""Power-function averages of any ``nn.Module``, snapshots of them, and any other length afterwards.

    ema = PowerEMA(model)                                     # tracks sigma_rel 0.05 and 0.10
    ema.update(time=images_seen, delta=batch)                 # after each optimizer step
    ema.save("snapshots")                                     # now and then
    model.load_state_dict(reconstruct("snapshots", sigma_rel=0.13))   # after training, any length

Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backends.pipeline.reconstruct import reconstruct as reconstruct_arrays
from backends.pipeline.snapshots import Snapshot, save_snapshot
from edm2_core.ema import beta, sigma_rel_to_gamma
from edm2_core.errors import InputError

from .weights import canonical_name, dump


class PowerEMA:
    """Averages of a module's floating parameters, one per relative length, on its device.

    The clock is whatever whole number you count (images, steps), the same in every call. Buffers are not averaged:
    snapshots hold them as they are. Averages stay float32 where parameters are narrower. Wrapping the module in DDP or
    torch.compile changes no name.

    Raises:
        InputError: a length outside (0, 0.2887), or none.
    """

    def __init__(self, module: nn.Module, *, sigma_rels: Sequence[float] = (0.05, 0.10)):
        if not sigma_rels:
            raise InputError(
                "PowerEMA needs one or more sigma_rels, got none: (0.05, 0.10) lets you choose any afterwards"
            )
        for sigma_rel in sigma_rels:
            sigma_rel_to_gamma(sigma_rel)
        self.time = 0
        self._tracked = {canonical_name(n): p for n, p in module.named_parameters() if p.is_floating_point()}
        self._buffers = {canonical_name(n): b for n, b in module.named_buffers()}
        self.averages = {
            float(sigma_rel): {name: _wide(p.detach()).clone() for name, p in self._tracked.items()}
            for sigma_rel in sigma_rels
        }

    @torch.no_grad()
    def update(self, *, time: int, delta: int) -> None:
        """Advance every average to ``time``, ``delta`` after the last update; any interval is exact (Eq. 127).

        Raises:
            InputError: unless 0 < delta <= time.
        """
        live = [_wide(p.detach()) for p in self._tracked.values()]
        for sigma_rel, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), live, 1 - beta(sigma_rel, t_next=time, t_delta=delta))
        self.time = time

    def arrays(self, sigma_rel: float) -> dict[str, Tensor]:
        """One average and the module's buffers, by name: what ``load_state_dict`` takes."""
        return {**self.averages[sigma_rel], **self._buffers}

    def save(self, folder: str | Path) -> list[Path]:
        """Write one snapshot per average into ``folder``, atomically; returns their paths."""
        paths = []
        for sigma_rel in self.averages:
            path = Path(folder) / f"{self.time:012d}-{sigma_rel:.3f}.safetensors"  # in full: clocks may count steps
            params = dump(self.arrays(sigma_rel))
            save_snapshot(path, Snapshot(params=params, config=None, nimg=self.time, sigma_rel=sigma_rel))
            paths.append(path)
        return paths

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: the clock and the averages. Goes through ``torch.save`` with weights only."""
        return {"time": self.time, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``. Raises InputError, and changes nothing, unless lengths and names are the same."""
        ours = {sigma_rel: set(average) for sigma_rel, average in self.averages.items()}
        theirs = {sigma_rel: set(average) for sigma_rel, average in state["averages"].items()}
        if ours != theirs:
            raise InputError(
                f"state must track the same lengths and parameters, got lengths {sorted(theirs)} for {sorted(ours)}: "
                "build PowerEMA with the module and sigma_rels that it was saved with"
            )
        self.time = state["time"]
        for sigma_rel, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(state["averages"][sigma_rel][name])


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None) -> dict[str, Tensor]:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns tensors by name, for ``load_state_dict``: averages in float32, counters as last stored. Source: Algorithm 3.
    """
    (snapshot,) = reconstruct_arrays(folder, nimg=time, sigma_rels=[sigma_rel])
    return {name: torch.from_numpy(array) for name, array in snapshot.params.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
