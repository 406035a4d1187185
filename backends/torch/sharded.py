"""Tensors that are sharded over processes (DTensor, as ``fully_shard`` makes them), for averages of them.

All processes must make the same calls in the same order: gathering a tensor waits for every one of them.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor, distributed

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
