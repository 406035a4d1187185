"""A training step, and the learner whose state it advances.

Order of a step (SPEC STEP): force the stored weights onto their spheres; compute the loss, and gradients through the
normalization; zero non-finite gradient elements; Adam; average the stored weights, after Adam and before they are
forced again.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backends.pipeline.runs.team import meeting
from edm2_core import loss as objective
from edm2_core.ema import Length
from edm2_core.state import Arrays, State

from .dropout import dropping
from .ema import PowerEMA
from .network import Layer, normalize
from .sharded import FullySharded, is_sharded, local_gradients, placed_as
from .weights import dump, load, tensors, unwrapped
from .working_weights import Shared, WorkingWeights, force, rows


class Batch(NamedTuple):
    """images and unit_noise [N, ...] (data of any shape), sigma [N, 1, ...] with as many axes, labels [N, label_dim] or
    None, condition [N, cond_channels, ...] or None; all float32. ``dropout``: seeds, int32 [N], or None."""

    images: Tensor
    unit_noise: Tensor
    sigma: Tensor
    labels: Tensor | None = None
    condition: Tensor | None = None
    dropout: Tensor | None = None

    def split(self, size: int | None) -> "list[Batch]":
        """This batch in parts of ``size`` images, the last may be smaller; None: in one part."""
        size = size or len(self.images)
        columns: list[Any] = [repeat(None) if x is None else x.split(size) for x in self]
        return [Batch(*part) for part in zip(*columns, strict=False)]


def batch_loss(network: nn.Module, batch: Batch) -> Tensor:
    """The loss of each element, shaped like ``batch.images``, float32. Source: Eqs. 14, 21.

    ``network`` is a :class:`~.denoiser.Denoiser`, perhaps wrapped by DDP or torch.compile.
    """
    noisy = batch.images + batch.unit_noise * batch.sigma
    plain = unwrapped(network)
    with dropping(plain, batch.dropout):
        denoised, logvar = network(noisy, batch.sigma, batch.labels, batch.condition)
    sigma_data = plain.sigma_data
    return objective.loss(denoised, batch.images, batch.sigma, logvar, sigma_data=sigma_data)


def force_weight_norm(network: nn.Module) -> None:
    """Put the stored weights back on their spheres, in place, on rungs that do so. Source: Eq. 66."""
    for layer in network.modules():
        if isinstance(layer, Layer) and layer.forced:
            force(rows(layer.weight))


def flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie, sharing its memory."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).view(-1)


def forced(layer: Layer) -> Tensor:
    """The weight that a step begins with."""
    return normalize(layer.weight, tuple(range(1, layer.weight.ndim))) if layer.forced else layer.weight


@torch.no_grad()
def zero_nonfinite(gradient: Tensor) -> Tensor:
    """Replace infinities, NaN and what overflows in Adam by 0, in place; returns where they were, boolean. Source: SPEC
    STEP-2."""
    beyond = ~(gradient.abs() < objective.LARGEST_GRADIENT)  # NaN is not less
    gradient.masked_fill_(beyond, 0)
    return beyond


def all_fit(gradients: Sequence[Tensor]) -> bool:
    """True only if :func:`zero_nonfinite` would change none of them. It waits for the device."""
    norms = torch._foreach_norm(list(gradients))  # no less than the largest element, and faster
    return bool((torch.stack(list(norms)) < objective.LARGEST_GRADIENT).all())


class Learner:
    """A denoiser with all that its training needs: Adam, averages of its weights, and the clock in images.

    Args:
        network: any :class:`~.denoiser.Denoiser` on its device, perhaps wrapped by torch.compile.
        betas: of Adam, whose eps is 1e-8.
        sigma_rels: lengths of the averages.
        loss_scaling: factor on the loss while gradients are computed; keeps float16 gradients from underflow.
        microbatch: images per forward pass; larger batches accumulate gradients.
        world: number of processes (torch.distributed) that share each batch in equal parts; their gradients are summed
            while the backward pass runs (DDP).
        frozen: canonical names of the parameters that are not trained.
        compiles: normalization and the check of gradients are compiled, once for tensors of all sizes.
        shards: the processes divide weights, moments and averages among them (FSDP2) instead of each having all.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        sigma_rels: Sequence[float | Length] = (0.05, 0.10),
        loss_scaling: float = 1.0,
        microbatch: int | None = None,
        world: int = 1,
        frozen: Collection[str] = (),
        compiles: bool = False,
        shards: bool = False,
    ):
        sharded = FullySharded(network, world=world) if shards else None  # first: it replaces parameters
        self.network, self.loss_scaling, self.microbatch, self.world = network.train(), loss_scaling, microbatch, world
        self.weights = {name: p for name, p in tensors(network).items() if p.requires_grad}
        kind = next(iter(self.weights.values())).device.type
        self.fused = kind in ("cpu", "cuda")  # then Adam's step counts are on the device too
        divided, whole = ([w for w in self.weights.values() if is_sharded(w) == it] for it in (True, False))
        groups = [{"params": weights} for weights in (divided, whole) if weights]  # no operation takes both
        self.optimizer = torch.optim.Adam(groups, betas=betas, eps=1e-8, fused=self.fused or None)
        self.ema = PowerEMA(network, sigma_rels=sigma_rels)
        self.steps = 0
        self._frozen = [self.weights[name] for name in frozen]
        self.shards, self.updating = shards, False
        self._working: Any = sharded or WorkingWeights(network, compiles=compiles)
        self._shared: Any = sharded or (network if world == 1 else self._among_processes())
        self._zero_nonfinite: Callable[[Tensor], Tensor] = (
            torch.compile(zero_nonfinite, dynamic=True) if compiles else zero_nonfinite
        )

    @property
    def nimg(self) -> int:
        """Images seen: the clock of the averages."""
        return self.ema.time

    def step(self, batch: Batch, *, lr: float) -> tuple[Tensor, Tensor]:
        """Train on this process's share of a batch. Returns its mean loss per element and the number of non-finite
        gradient elements that were zeroed, both 0-d on the device."""
        total = len(batch.images) * self.world
        self.optimizer.zero_grad(set_to_none=True)
        *parts, last = batch.split(self.microbatch)
        losses = []
        with self._working.computed():
            for part in parts:
                with nullcontext() if self.world == 1 else self._shared.no_sync():
                    losses.append(self._add_gradients(part, total))
            with nullcontext() if self.world == 1 else meeting(passes=_exhausted):
                losses.append(self._add_gradients(last, total))
        self._working.pull_gradients()
        for weight in self._frozen:
            weight.grad = None  # Adam passes over it
        gradients = local_gradients(self.weights.values())
        if self.loss_scaling != 1:
            torch._foreach_mul_(gradients, 1 / self.loss_scaling)
        nonfinite = self._zeroed(gradients)
        if self.shards:
            with meeting():
                torch.distributed.all_reduce(nonfinite)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.updating = True  # stays, if the memory is exhausted half-way
        self.optimizer.step()
        self.steps += 1
        self.ema.update(time=self.nimg + total, delta=total)
        self.updating = False
        return torch.stack(losses).sum() / batch.images.numel(), nonfinite

    def _among_processes(self) -> DistributedDataParallel:
        """The network as all processes share it: a bucket of gradients is sent while others are computed."""
        stored = {id(layer.weight) for layer in self._working.layers}
        others = [weight for weight in self.weights.values() if id(weight) not in stored]
        shared = Shared(self.network, [*self._working.parameters, *others])
        # of kernels of one pixel, which lie alike by either strides
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with meeting():
            return DistributedDataParallel(shared, gradient_as_bucket_view=True)

    def _zeroed(self, gradients: Sequence[Tensor]) -> Tensor:
        """The number of elements of ``gradients`` that were zeroed. Only on a CPU, where there is nothing to wait for,
        is it asked first whether there are any."""
        if gradients[0].device.type == "cpu" and all_fit(gradients):
            return torch.zeros((), dtype=torch.int64)
        return torch.cat([self._zero_nonfinite(flat(gradient)) for gradient in gradients]).sum()

    def _add_gradients(self, part: Batch, total: int) -> Tensor:
        """Add the gradients of a part of ``total`` images, scaled; returns its summed loss."""
        loss = batch_loss(self._shared, part)
        scale = self.loss_scaling * self.world / total  # DDP divides the sum over processes by their number
        (loss.sum() * scale).backward()
        return loss.detach().sum()

    def state(self, names: Collection[str] | None = None, /) -> State:
        """What training continues from, in the canonical form that all ports share: everything, or what belongs to the
        parameters ``names``."""

        def some(values: Mapping[str, Tensor]) -> Arrays:
            return dump(values, names)

        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.weights.items()}
        first, second = (
            some({name: m[key] if key in m else torch.zeros_like(self.weights[name]) for name, m in moments.items()})
            for key in ("exp_avg", "exp_avg_sq")
        )
        return State(
            params=some(tensors(self.network)),
            moments1=first,
            moments2=second,
            averages={length: some(self.ema.arrays(length)) for length in self.ema.averages},
            nimg=self.nimg,
            steps=self.steps,
        )

    def load_state(self, state: State) -> None:
        """Continue from ``state``, whichever port wrote it.

        Raises:
            InputError: it is of another network or of other averages.
        """
        load(self.network, state.params)
        for name, weight in self.weights.items():
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(state.steps), device=weight.device if self.fused else "cpu"),
                "exp_avg": _like(weight, state.moments1[name]),
                "exp_avg_sq": _like(weight, state.moments2[name]),
            }
        tracked = next(iter(self.ema.averages.values()))
        averages = {
            length.key: {name: torch.tensor(average[name]) for name in tracked}
            for length, average in state.averages.items()
        }
        self.ema.load_state_dict({"time": state.nimg, "averages": averages})
        self.steps = state.steps


def _exhausted(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _like(weight: Tensor, array: np.ndarray) -> Tensor:
    """``array`` in memory of its own, laid out and divided as ``weight`` is: Adam then takes all in one pass."""
    return torch.empty_like(weight, requires_grad=False).copy_(placed_as(weight, torch.tensor(array)))
