"""Tensors that are sharded over processes (DTensor, as ``fully_shard`` makes them), for averages of them.

All processes must make the same calls in the same order: gathering a tensor waits for every one of them.
"""

from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor


def local_part(tensor: Tensor, /) -> Tensor:
    """The part of ``tensor`` that this process has; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(like: Tensor, tensor: Tensor, /) -> Tensor:
    """``tensor``, which every process has whole, sharded as ``like`` is; without communication."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def told_by_first(flag: bool, /) -> bool:
    """The ``flag`` of the first process, in every process."""
    flags = [flag]
    distributed.broadcast_object_list(flags, src=0)
    return flags[0]
