"""Power-function averages of the weights of any ``nn.Module``, their snapshots, and averages of any other length.

    ema = PowerEMA(model)                                     # tracks sigma_rel 0.05 and 0.10
    ema.update(time=images_seen, delta=batch)                 # after each optimizer step
    ema.save("snapshots")                                     # now and then
    with ema.applied(0.10, model): ...                        # evaluate an average; the live weights are restored
    model.load_state_dict(reconstruct("snapshots", sigma_rel=0.13))   # after training, any length

A bfloat16 average has 8 significant bits, and an update is far smaller than the last of them: rounding to nearest
would never change it. Stochastic rounding is used instead, which is unbiased. Compared with a float32 average it adds
noise of about sqrt(d u / 2), where d is the distance of the weights from their average and u the spacing of bfloat16
there, 2^-8 to 2^-7 of the value. The random bits are a function of the clock, so the state needs no generator.

Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_sources
from backends.pipeline.checkpoints.snapshots import save_averages
from backends.pipeline.checkpoints.sources import open_sources
from edm2_core.ema import Length
from edm2_core.errors import InputError

from .weights import canonical_name, dump, tensors

_TOGETHER = 1 << 24  # elements rounded at once: few kernels, and little memory compared with the averages


class PowerEMA:
    """Averages of a module's floating-point parameters, one per length.

    Time is any whole number you count (images, steps), the same in every call. Buffers are not averaged: snapshots hold
    their current values. Wrapping the module in DDP or torch.compile changes no name. ``averages`` holds the tensors,
    by :class:`~edm2_core.ema.Length`, then by name; ``time`` is that of the last update.

    Args:
        module: the module to average; its parameters must stay the same tensors while it trains.
        sigma_rels: relative lengths; ``Length.half_life(images)`` for a traditional average.
        trainable_only: average only parameters that require a gradient now, such as a LoRA's; snapshots then hold
            nothing else.
        device: where the averages are kept; None: where each parameter is. With averages on the CPU and weights on an
            accelerator, ``update`` waits for the weights to be copied; otherwise it does not synchronize.
        dtype: of the averages, torch.bfloat16 to save memory; None: float32, or wider where parameters are.

    Raises:
        InputError: a length outside (0, 0.2887), or none; a dtype that is neither bfloat16 nor wider.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sigma_rels: Sequence[float | Length] = (0.05, 0.10),
        trainable_only: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not sigma_rels:
            raise InputError(
                "PowerEMA needs one or more sigma_rels, got none: (0.05, 0.10) lets you choose any afterwards"
            )
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(
                f"dtype must be torch.bfloat16, float32 or float64, got {dtype}: choose one of them, or None"
            )
        self.time = 0
        self._tracked = _tracked(module, trainable_only=trainable_only)
        self._same, self._buffers = ({}, {}) if trainable_only else _besides(module, self._tracked)
        self.averages = {
            length: {
                name: p.detach().to(device, dtype or _wide(p.dtype), copy=True) for name, p in self._tracked.items()
            }
            for length in map(Length.of, sigma_rels)
        }

    @torch.no_grad()
    def update(self, *, time: int, delta: int) -> None:
        """Advance every average to ``time``, ``delta`` after the last update. Exact for any ``delta``. Source: Eq. 127.

        Raises:
            InputError: unless 0 < delta <= time.
        """
        shares = [1 - length.beta(t_next=time, t_delta=delta) for length in self.averages]
        live = self._live()
        for index, (share, average) in enumerate(zip(shares, self.averages.values(), strict=True)):
            _move(list(average.values()), live, share, seed=(time, index))
        self.time = time

    def _live(self) -> list[Tensor]:
        """The weights, on the devices of their averages, in the dtype that is computed in."""
        pairs = list(zip(self._tracked.values(), next(iter(self.averages.values())).values(), strict=True))
        live = [p.detach().to(average.device, non_blocking=True) for p, average in pairs]
        copied_from = {p.device for p, average in pairs if average.device.type == "cpu" != p.device.type}
        for device in copied_from:  # reading on the CPU before the copies complete is a race
            torch.accelerator.current_stream(device).synchronize()
        return [weight.to(_wide(average.dtype)) for weight, (_, average) in zip(live, pairs, strict=True)]

    def arrays(self, sigma_rel: float | Length) -> dict[str, Tensor]:
        """One average and the module's buffers, by name, for ``load_state_dict``.

        With ``trainable_only`` other parameters are missing: use ``load_state_dict(..., strict=False)``.
        """
        average = self._average(sigma_rel)
        return {**average, **{name: average[first] for name, first in self._same.items()}, **self._buffers}

    @torch.no_grad()
    def copy_to(self, module: nn.Module, /, *, sigma_rel: float | Length) -> None:
        """Overwrite the parameters of ``module``, the averaged one or one with the same parameters, with an average.

        Raises:
            InputError: the length is not tracked, or ``module`` lacks a parameter; nothing is written then.
        """
        for parameter, average in self._pairs(module, sigma_rel):
            parameter.copy_(average)

    @contextmanager
    def applied(self, sigma_rel: float | Length, module: nn.Module, /) -> Iterator[None]:
        """Within it, ``module`` has the average; afterwards, also after an error, its own weights again.

        For evaluation only: changes of the weights inside are lost. Raises InputError as :meth:`copy_to`.
        """
        parameters = [parameter for parameter, _ in self._pairs(module, sigma_rel)]
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            self.copy_to(module, sigma_rel=sigma_rel)
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(parameters, kept, strict=True):
                    parameter.copy_(weight)

    def _pairs(self, module: nn.Module, sigma_rel: float | Length) -> list[tuple[Tensor, Tensor]]:
        """Each parameter of ``module`` that is averaged, with its average."""
        own, average = tensors(module), self._average(sigma_rel)
        for name, tensor in average.items():
            if name not in own or own[name].shape != tensor.shape:
                got = tuple(own[name].shape) if name in own else "none"
                raise InputError(
                    f"the module must have {name} of shape {tuple(tensor.shape)}, got {got}: give the one averaged"
                )
        return [(own[name], tensor) for name, tensor in average.items()]

    def _average(self, sigma_rel: float | Length) -> dict[str, Tensor]:
        length = Length.of(sigma_rel)
        if length not in self.averages:
            raise InputError(
                f"the length must be one of those tracked, {', '.join(map(str, self.averages))}, got {length}: "
                "reconstruct makes others from what was saved"
            )
        return self.averages[length]

    def save(self, folder: str | Path) -> list[Path]:
        """Write one snapshot per average into ``folder``, atomically; returns their paths."""
        averages = ((length, dump(self.arrays(length))) for length in self.averages)
        return save_averages(folder, averages, time=self.time)

    def state_dict(self) -> dict[str, Any]:
        """The clock and the averages, for ``torch.save`` and ``torch.load(weights_only=True)``."""
        return {"time": self.time, "averages": {length.key: average for length, average in self.averages.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict()``. Raises InputError, and changes nothing, unless lengths, names and shapes are the
        same."""
        theirs = {Length.of(key): average for key, average in state["averages"].items()}
        if _shapes(self.averages) != _shapes(theirs):
            raise InputError(
                f"state must track the same lengths and parameters, got lengths {list(map(str, theirs))} for "
                f"{list(map(str, self.averages))}: build PowerEMA with the module and sigma_rels that it was saved with"
            )
        self.time = state["time"]
        for length, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(theirs[length][name])


def reconstruct(folder: str | Path, *, sigma_rel: float, time: int | None = None) -> dict[str, Tensor]:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns tensors by name, for ``load_state_dict``: averages in float32, counters as last stored. Source: Algorithm 3.

    Raises:
        InputError: no snapshots there, a broken one, or a length out of range.
    """
    (snapshot,) = reconstruct_sources(open_sources(folder), time=time, sigma_rels=[sigma_rel])
    return {name: torch.from_numpy(array) for name, array in snapshot.params.items()}


def _tracked(module: nn.Module, *, trainable_only: bool) -> dict[str, Tensor]:
    return {
        canonical_name(name): p
        for name, p in module.named_parameters()
        if p.is_floating_point() and (p.requires_grad or not trainable_only)
    }


def _besides(module: nn.Module, tracked: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What ``load_state_dict`` needs besides: second names of tied parameters, and tensors that are not averaged."""
    first = {id(p): name for name, p in tracked.items()}
    others = {name: t for name, t in tensors(module).items() if name not in tracked and isinstance(t, Tensor)}
    same = {name: first[id(t)] for name, t in others.items() if id(t) in first}
    return same, {name: t for name, t in others.items() if name not in same}


def _shapes(averages: Mapping[Length, Mapping[str, Tensor]]) -> dict[Length, dict[str, torch.Size]]:
    return {length: {name: t.shape for name, t in average.items()} for length, average in averages.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _move(averages: list[Tensor], live: list[Tensor], share: float, *, seed: tuple[int, int]) -> None:
    """lerp(average, live, share) in place. ``seed`` is that of stochastic rounding to bfloat16."""
    if all(average.dtype != torch.bfloat16 for average in averages):
        torch._foreach_lerp_(averages, live, share)
        return
    for index, group in enumerate(_groups(averages)):
        narrow = [averages[i] for i in group]
        wide = torch.cat([average.flatten() for average in narrow]).float()
        wide.lerp_(torch.cat([live[i].flatten() for i in group]), share)
        parts = torch.split(_rounded(wide, seed=(*seed, index)), [average.numel() for average in narrow])
        torch._foreach_copy_(narrow, [part.view_as(average) for part, average in zip(parts, narrow, strict=True)])


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of consecutive tensors on one device, at most _TOGETHER elements in a group of more than one tensor."""
    group: list[int] = []
    room = 0
    for i, tensor in enumerate(tensors):
        if group and (tensor.numel() > room or tensor.device != tensors[group[0]].device):
            yield group
            group = []
        room = (room if group else _TOGETHER) - tensor.numel()
        group.append(i)
    if group:
        yield group


def _rounded(x: Tensor, *, seed: Sequence[int]) -> Tensor:
    """float32 ``x`` rounded stochastically to bfloat16, so that the expectation is ``x``.

    bfloat16 is float32 without its last 16 bits: add 16 random bits, then truncate.
    """
    generator = torch.Generator(x.device)
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 1)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    up_or_down = (x.view(torch.int32) + noise & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), up_or_down, x).to(torch.bfloat16)  # random bits can turn a NaN into a number
