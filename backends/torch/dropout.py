"""Dropout by counter: what is dropped of an image is a function of that image's seed alone.

So it does not depend on how a batch is divided, among processes or into parts, nor on whether activations are computed
twice. PyTorch's generators are sequential: each element would depend on how many were drawn before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes elements with probability ``p``, in training, and scales the others by 1 / (1 - p).

    Within :func:`dropping` the seeds decide which; otherwise PyTorch's global generator.
    """

    seeds: tuple[Tensor] | None  # int32 [N]; in a tuple: no buffer

    def __init__(self, p: float):
        super().__init__()
        self.p, self.seeds = p, None

    def forward(self, x: Tensor) -> Tensor:
        """x [N, ...], kept in shape and dtype."""
        if not (self.training and self.p):
            return x
        if self.seeds is None:
            return F.dropout(x, self.p)
        (seeds,) = self.seeds
        elements = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view(1, *x.shape[1:])
        drawn = mixed(mixed(elements) ^ seeds.view(-1, *[1] * (x.ndim - 1))) & 0x7FFFFFFF  # uniform below 2^31
        return x * ((drawn >= round(self.p * (1 << 31))).to(x.dtype) / (1 - self.p))


@contextmanager
def dropping(network: nn.Module, seeds: Tensor | None, /) -> Iterator[None]:
    """Within it, the :class:`Dropout` modules of ``network`` drop by ``seeds``, int32 [N], one an image; each module
    differently. None: by the global generator."""
    modules = [module for module in network.modules() if isinstance(module, Dropout)] if seeds is not None else []
    try:
        for index, module in enumerate(modules, 1):
            assert seeds is not None
            module.seeds = (mixed(seeds + index),)
        yield
    finally:
        for module in modules:
            module.seeds = None


def mixed(x: Tensor) -> Tensor:
    """A bijection of int32 in which each bit of ``x`` changes each of the result with probability near 1/2. Source: the
    finalizer of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ _shifted(x, 16)) * -2048144789  # 0x85EBCA6B
    x = (x ^ _shifted(x, 13)) * -1028477387  # 0xC2B2AE35
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros following: PyTorch repeats the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
