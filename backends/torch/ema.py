"""Power-function averages of the weights of any ``nn.Module``, their snapshots, and averages of any other length.

    ema = PowerEMA(model)                                     # tracks sigma_rel 0.05 and 0.10
    ema.update(time=images_seen, delta=batch)                 # after each optimizer step
    ema.save("snapshots")                                     # now and then
    with ema.applied(0.10, model): ...                        # evaluate an average; the live weights are restored
    model.load_state_dict(reconstruct("snapshots", sigma_rel=0.13, like=model))   # after training, any length
    best_length("snapshots", like=model, metric=validation_loss).sigma_rel        # or the best by your own function

A bfloat16 average has 8 significant bits, and an update is far smaller than the last of them: rounding to nearest
would never change it. Stochastic rounding is used instead, which is unbiased. Compared with a float32 average it adds
noise of about sqrt(d u / 2), where d is the distance of the weights from their average and u the spacing of bfloat16
there, 2^-8 to 2^-7 of the value. The random bits are a function of the clock, so the state needs no generator.

Source: arXiv 2312.02696 Section 3, Appendix C.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from backends.pipeline.checkpoints.averages import ALONE, Gathered, Processes, save_gathered
from backends.pipeline.checkpoints.reconstruct import reconstruct as reconstruct_sources
from backends.pipeline.checkpoints.snapshots import Snapshot
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.runs.best_length import BestLength
from backends.pipeline.runs.best_length import best_length as best_measured
from edm2_core.ema import Length, StorageDtype
from edm2_core.ema.clock import start_time, tick
from edm2_core.errors import InputError

from .sharded import is_sharded, local_part, placed_as, told_by_first
from .weights import canonical_names, tensors, to_numpy, to_tensor

_TOGETHER = 1 << 24  # elements rounded at once: few kernels, and little memory compared with the averages


class PowerEMA:
    """Averages of a module's real and complex parameters, one per length.

    Time is any whole number you count (images, steps) below 2^53, the same in every call. Buffers are not averaged:
    snapshots hold their current values, in their own dtype. So the statistics of a BatchNorm are those of the live
    weights; recompute them for an average with ``torch.optim.swa_utils.update_bn``. Wrapping the module, or modules in
    it, by DDP, FSDP or torch.compile changes no name. ``averages`` holds the tensors, by
    :class:`~edm2_core.ema.Length`, then by name; ``time`` is that of the last update.

    The parameters may be sharded (``fully_shard``, any DTensor): averages are sharded alike, and equal those of the
    whole module bit for bit, except for the random rounding of bfloat16. Then every process makes the same calls.

    Args:
        module: the module to average; its parameters must stay the same tensors while it trains.
        sigma_rels: relative lengths; ``Length.half_life(images)`` for a traditional average.
        trainable_only: average only parameters that require a gradient now, such as a LoRA's; snapshots then hold
            nothing else.
        device: where the averages are kept; None: where each parameter is. With averages on the CPU and weights on an
            accelerator, ``update`` waits for the weights to be copied; otherwise it does not synchronize.
        dtype: of the averages, torch.bfloat16 to save memory; None: float32, or wider where parameters are. Complex
            averages are complex64 or wider.
        start: the time at construction. With 0, the first update replaces the averages by the weights: what was before
            does not count, also when weights are fine-tuned. With another time, the weights now count as the average
            until then: an average that goes on from pretraining.

    Raises:
        InputError: a length outside (0, 0.2887), or none; a dtype that is neither bfloat16 nor wider; a negative start.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sigma_rels: Sequence[float | Length] = (0.05, 0.10),
        trainable_only: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        start: int = 0,
    ):
        if not sigma_rels:
            raise InputError(
                "PowerEMA needs one or more sigma_rels, got none: (0.05, 0.10) lets you choose any afterwards"
            )
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(
                f"dtype must be torch.bfloat16, float32 or float64, got {dtype}: choose one of them, or None"
            )
        self.time = start_time(start)
        self._module, self._trainable_only = module, trainable_only
        self._tracked = _tracked(module, trainable_only=trainable_only)
        self._identities = _identities(module)
        self.averages = {
            length: {
                name: p.detach().to(device, (p.is_floating_point() and dtype) or _wide(p.dtype), copy=True)
                for name, p in self._tracked.items()
            }
            for length in map(Length.of, sigma_rels)
        }

    @torch.no_grad()
    def update(self, *, time: int, delta: int) -> None:
        """Advance every average to ``time``, ``delta`` after the last update. Exact for any ``delta``. Source: Eq. 127.

        Raises:
            InputError: ``time - delta`` is not the time of the last update; or a parameter is no longer the tensor that
                it was, or new.
        """
        now = tick(self.time, time=time, delta=delta)
        shares = [1 - length.beta(t_next=now, t_delta=now - self.time) for length in self.averages]
        live = self._live()
        for index, (share, average) in enumerate(zip(shares, self.averages.values(), strict=True)):
            _move(list(map(local_part, average.values())), live, share, seed=(now, index))
        self.time = now

    def _live(self) -> list[Tensor]:
        """The weights, on the devices of their averages, in the dtype that is computed in; of DTensors the shards."""
        if (identities := _identities(self._module)) != self._identities:
            self._check_unreplaced()
            self._identities = identities
        averages = list(map(local_part, next(iter(self.averages.values())).values()))
        live = list(map(local_part, self._tracked.values()))
        if any(p.device != average.device for p, average in zip(live, averages, strict=True)):
            live = _moved(live, [average.device for average in averages])
        wide = [_wide(average.dtype) for average in averages]
        return [p if p.dtype == dtype else p.to(dtype) for p, dtype in zip(live, wide, strict=True)]

    def _check_unreplaced(self) -> None:
        own = tensors(self._module)
        for name, parameter in self._tracked.items():
            if own.get(name) is not parameter:
                raise InputError(
                    f"parameters must stay the tensors that PowerEMA was given, got another for {name}: construct it "
                    "after parameters are replaced; its state can be loaded into the new one"
                )
        for name in _tracked(self._module, trainable_only=self._trainable_only).keys() - self._tracked.keys():
            raise InputError(
                f"parameters must be those that PowerEMA was given, got another, {name}: construct it after parameters "
                "are added"
            )

    def arrays(self, sigma_rel: float | Length) -> dict[str, Tensor]:
        """One average and the module's buffers as they are now, by name, for ``load_state_dict``.

        With ``trainable_only`` other parameters are missing: use ``load_state_dict(..., strict=False)``.
        """
        average, (same, kept) = self._average(sigma_rel), self._besides()
        return {**average, **{name: average[first] for name, first in same.items()}, **kept}

    def _besides(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What snapshots hold besides averages: second names of tied parameters, and tensors that are not averaged."""
        if self._trainable_only:
            return {}, {}
        first = {id(p): name for name, p in self._tracked.items()}
        others = {name: t for name, t in tensors(self._module).items() if name not in self._tracked}
        same = {name: first[id(t)] for name, t in others.items() if id(t) in first}
        return same, {name: t for name, t in others.items() if name not in same}

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

    def save(self, folder: str | Path, *, dtype: StorageDtype = "float16") -> list[Path]:
        """Write one snapshot per average into ``folder``, atomically; returns their paths.

        Averages are stored in ``dtype``, or in float32 where it cannot hold them; buffers as they are. If parameters
        are sharded, call it in every process: each tensor is gathered once, and the first process writes.

        Raises:
            InputError: no update yet; weights that are not finite; a failed write, in every process.
        """
        same, kept = self._besides()
        arrays = {name: to_numpy(tensor) for name, tensor in kept.items()}
        sharded = any(is_sharded(p) for p in self._tracked.values())
        processes = Processes(distributed.get_rank(), told_by_first) if sharded else ALONE
        return save_gathered(folder, self._gathered(same), processes, time=self.time, kept=arrays, dtype=dtype)

    def _gathered(self, same: Mapping[str, str]) -> Gathered:
        """(length, name, array) of all averages, in order, to be read at once; each tensor is gathered, and copied to
        the host, when it is asked for."""
        for length, average in self.averages.items():
            for name, tensor in average.items():
                array = to_numpy(tensor.float() if tensor.dtype == torch.bfloat16 else tensor, copy=False)
                for known in (name, *(second for second, first in same.items() if first == name)):
                    yield length, known, array

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
                tensor.copy_(placed_as(tensor, theirs[length][name]))


def reconstruct(
    folder: str | Path, *, sigma_rel: float, time: int | None = None, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """The average of length ``sigma_rel`` at ``time`` (None: the last snapshot's), from the snapshots in ``folder``.

    Returns tensors by name, for ``load_state_dict``: averages in float32 or complex64, others as last stored. ``like``
    is the module that will load them: names are then those of its ``state_dict``, however it is wrapped, and tensors
    are sharded as its own. Source: Algorithm 3.

    Raises:
        InputError: no snapshots there, a broken one, a length out of range, or tensors that ``like`` does not have.
    """
    (snapshot,) = reconstruct_sources(open_sources(folder), time=time, sigma_rels=[sigma_rel])
    return _for_module(snapshot, like)


def best_length(
    folder: str | Path,
    *,
    like: nn.Module,
    metric: Callable[[nn.Module], float],
    sigma_rels: Sequence[float] = (),
    points: int = 9,
    time: int | None = None,
) -> BestLength:
    """The length whose average has the lowest ``metric``, such as a validation loss, and the values of all measured.

    ``metric`` is called with ``like``, which then holds an average, and afterwards its own weights again. Return the
    negative of what should be high; choose the mode (``eval``) and recompute the statistics of BatchNorm in it. Other
    arguments and InputError as :func:`~backends.pipeline.runs.best_length.best_length`; and as :func:`reconstruct`.
    """
    own = {name: value.detach().clone() for name, value in like.state_dict().items() if isinstance(value, Tensor)}

    def measure(snapshot: Snapshot) -> float:
        like.load_state_dict(_for_module(snapshot, like), strict=False)  # a LoRA's snapshots hold nothing else
        return metric(like)

    try:
        return best_measured(folder, measure, sigma_rels=sigma_rels, points=points, time=time)
    finally:
        like.load_state_dict(own, strict=False)


def _for_module(snapshot: Snapshot, like: nn.Module | None) -> dict[str, Tensor]:
    stored = {name: to_tensor(array) for name, array in snapshot.params.items()}
    if like is None:
        return stored
    state = like.state_dict(keep_vars=True)
    own = {name: wrapped for wrapped, name in canonical_names(state).items()}
    for name, tensor in stored.items():
        if name not in own or state[own[name]].shape != tensor.shape:
            got = tuple(state[own[name]].shape) if name in own else "none"
            raise InputError(
                f"like must have {name} of shape {tuple(tensor.shape)}, got {got}: give the module that was averaged"
            )
    return {own[name]: placed_as(state[own[name]], tensor) for name, tensor in stored.items()}


def _tracked(module: nn.Module, *, trainable_only: bool) -> dict[str, Tensor]:
    return {
        name: p
        for name, p in _once(tensors(module)).items()
        if isinstance(p, nn.Parameter)
        and (p.is_floating_point() or p.is_complex())
        and (p.requires_grad or not trainable_only)
    }


def _moved(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    moved = [t.to(device, non_blocking=True) for t, device in zip(tensors, devices, strict=True)]
    copied_from = {
        t.device for t, device in zip(tensors, devices, strict=True) if device.type == "cpu" != t.device.type
    }
    for device in copied_from:  # reading on the CPU before the copies complete is a race
        torch.accelerator.current_stream(device).synchronize()
    return moved


def _identities(module: nn.Module) -> list[int]:
    """Of all modules and parameters in ``module``, in order: it changes where one of them is replaced. To find their
    names, which need not be looked at then, takes longer than the update of a small network."""
    found, waiting = [], [module]
    while waiting:
        part = waiting.pop()
        found += [id(part), *map(id, part._parameters.values())]
        waiting += [child for child in part._modules.values() if child is not None]
    return found


def _once(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under its first name."""
    first: dict[int, str] = {}
    return {name: t for name, t in named.items() if first.setdefault(id(t), name) == name}


def _shapes(averages: Mapping[Length, Mapping[str, Tensor]]) -> dict[Length, dict[str, torch.Size]]:
    return {length: {name: t.shape for name, t in average.items()} for length, average in averages.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _move(averages: Sequence[Tensor], live: Sequence[Tensor], share: float, *, seed: tuple[int, int]) -> None:
    """lerp(average, live, share) in place. ``seed`` is that of stochastic rounding to bfloat16."""
    pairs = list(zip(averages, live, strict=True))
    if wide := [pair for pair in pairs if pair[0].dtype != torch.bfloat16]:
        torch._foreach_lerp_([average for average, _ in wide], [weight for _, weight in wide], share)
    narrow = [pair for pair in pairs if pair[0].dtype == torch.bfloat16]
    for index, group in enumerate(_groups([average for average, _ in narrow])):
        moved = [narrow[i][0] for i in group]
        together = torch.cat([average.flatten() for average in moved]).float()
        together.lerp_(torch.cat([narrow[i][1].flatten() for i in group]), share)
        parts = torch.split(_rounded(together, seed=(*seed, index)), [average.numel() for average in moved])
        torch._foreach_copy_(moved, [part.view_as(average) for part, average in zip(parts, moved, strict=True)])


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
