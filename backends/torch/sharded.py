"""Tensors that are sharded over processes (DTensor, as ``fully_shard`` makes them), and the training of a network of
them.

All processes must make the same calls in the same order: gathering a tensor waits for every one of them.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from .network import Layer, UNetBlock
from .working_weights import force, rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor, /) -> "TypeIs[DTensor]":
    """Whether ``tensor`` is a DTensor, whose module takes a second to import and is there where one was made."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor, /) -> Tensor:
    """The part of ``tensor`` that this process has; a tensor that is not sharded itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def placed_as(like: Tensor, tensor: Tensor, /) -> Tensor:
    """``tensor``, which every process has whole, sharded as ``like`` is; without communication."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def told_by_first(flag: bool, /) -> bool:
    """The ``flag`` of the first process, in every process."""
    flags = [flag]
    distributed.broadcast_object_list(flags, src=0)
    return flags[0]


def local_gradients(weights: Iterable[Tensor], /) -> list[Tensor]:
    """What this process has of their gradients, without empty parts."""
    parts = [local_part(weight.grad) for weight in weights if weight.grad is not None]
    return [part for part in parts if part.numel()]


class FullySharded:
    """``module``, an EDM2 network whose weights are from now on divided among the processes (FSDP2), and with them
    gradients, moments and averages. A block's weights are whole only while it is computed.

    Rows, of which each is normalized by itself, stay in one process. Gains have no rows: each process has them all, and
    their gradients are averaged here, as FSDP2 averages the others. The calls are those of
    :class:`~.working_weights.WorkingWeights` and of DDP.
    """

    def __init__(self, module: nn.Module, *, world: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.module: Any = module
        self._gains = [p for p in module.parameters() if p.ndim == 0]
        kind = next(module.parameters()).device.type
        mesh = init_device_mesh(kind, (world,))
        gains = set(self._gains)
        for part in (*(block for block in module.modules() if isinstance(block, UNetBlock)), module):
            fully_shard(part, mesh=mesh, ignored_params=gains)
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view")  # that nothing writes into
        self._layers = [layer for layer in module.modules() if isinstance(layer, Layer)]

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, gradients are added up in each process, and not sent."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Force the stored weights. Within it, layers normalize them as they use them."""
        for layer in self._layers:
            if layer.forced and (part := local_part(layer.weight)).numel():
                force(rows(part))
        yield

    def pull_gradients(self) -> None:
        """Average the gradients that FSDP2 does not."""
        there = [gain.grad for gain in self._gains if gain.grad is not None]
        if there:
            together = torch.stack(there)
            distributed.all_reduce(together, distributed.ReduceOp.SUM)
            torch._foreach_copy_(there, list(together / distributed.get_world_size()))
