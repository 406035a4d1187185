"""How a network is made ready for its device: memory layout, torch.compile, CUDA graphs.

Kernels that PyTorch compiles are kept in ~/.cache/edm2/torch, unless TORCHINDUCTOR_CACHE_DIR names another folder.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from shutil import which
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from backends.pipeline.runs.networks import CACHE
from backends.ports import Compile
from edm2_core.errors import InputError

from .network import Network, UNet, UNetBlock

Mode = Literal["default", "max-autotune-no-cudagraphs"]
Answer = Callable[..., Tensor]
_NO_FAULT = (  # what the compiler warns of
    "TensorFloat32 tensor cores",  # sampling does without them, for equal images
    r"\s*Online softmax is disabled",
)


def compile_mode(compile: Compile, device: torch.device, /) -> Mode | None:
    """How torch.compile is called for ``device``; None: not at all.

    Raises:
        InputError: ``compile`` is max or blocks, and there is no compiler.
    """
    on_cuda = device.type == "cuda"
    if compile == "off" or (compile == "auto" and not on_cuda):
        return None
    if not (has_triton() if on_cuda else has_cpp()):
        if compile == "auto":
            return None
        needed = "Triton" if on_cuda else "a C++ compiler"
        raise InputError(f"--compile {compile} needs {needed}, got none: install it")
    return "max-autotune-no-cudagraphs" if compile == "max" else "default"


def has_cpp() -> bool:
    """Whether there is a compiler of C++, which torch.compile writes for a CPU."""
    return any(map(which, (os.environ.get("CXX", "g++"), "clang++", "cl")))


def made_ready(
    network: nn.Module, device: torch.device, mode: Mode | None, /, *, by_block: bool = False, sharded: bool = False
) -> None:
    """Lay out the weights as the device's convolutions read them, and compile calls of ``network``, as one graph for
    each size of batch.

    ``by_block``: each block is compiled by itself, for all batches of two or more; blocks of equal shape share what is
    compiled. ``sharded``: so it is too, and activations alone are laid out: the weights of a network that will be
    sharded must be contiguous.
    """
    if device.type in ("cuda", "cpu") and not sharded:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif isinstance(network, Network):
        network.unet.register_forward_pre_hook(_channels_last)
    if mode is not None:
        for message in _NO_FAULT:
            warnings.filterwarnings("ignore", message)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "torch"))
        if by_block or sharded:
            compile_blocks(network, mode=mode)
        else:
            network.compile(fullgraph=True, dynamic=False, mode=mode)


def compile_blocks(network: nn.Module, /, **options: Any) -> None:
    """Compile each block of the U-Nets in ``network`` by itself; ``options`` are those of torch.compile."""
    unets = [module for module in network.modules() if isinstance(module, UNet)]
    blocks = [module for unet in unets for module in unet.modules() if isinstance(module, UNetBlock)]
    for unet in unets:
        unet.batch_varies = True
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, **options)
    # all blocks count as one function: kinds of block, each in training and in evaluation, for one image and for more
    limits: Any = import_module("torch._dynamo.config")  # importing it takes seconds
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))


def eagerly() -> AbstractContextManager[None]:
    """Within it, what is compiled runs as it was written: hooks are called, and no new batch costs a compilation."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _channels_last(unet: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return (x.contiguous(memory_format=torch.channels_last), *others)


@dataclass
class FixedSizes:
    """``answer`` on few sizes of batch, since each costs a compilation or a graph: a smaller batch is padded to a size
    seen before, where that is less than twice as large."""

    answer: Answer
    sizes: set[int] = field(default_factory=set)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        count = next(len(x) for x in inputs if x is not None)
        size = min((size for size in self.sizes if count <= size < 2 * count), default=count)
        self.sizes.add(size)
        if size == count:
            return self.answer(*inputs)
        rows = torch.arange(size).clamp(max=count - 1)
        return self.answer(*(None if x is None else x[rows.to(x.device)] for x in inputs))[:count]


@dataclass
class Graphs:
    """``answer``, recorded as a CUDA graph at the first call of each shape and replayed from then on: a network's many
    small kernels are launched at once. It must be a function of its inputs alone, on the current device."""

    answer: Answer
    recorded: dict[tuple[torch.Size | None, ...], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = field(
        default_factory=dict
    )

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        shapes = tuple(None if x is None else x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self._record(inputs)
        graph, own, output = self.recorded[shapes]
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    def _record(self, inputs: tuple[Tensor | None, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        own = [None if x is None else x.clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate their workspaces before anything is recorded
            for _ in range(3):
                self.answer(*own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.answer(*own)
        return graph, own, output
