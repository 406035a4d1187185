"""How a network is made ready for its device: memory layout, torch.compile, CUDA graphs.

Kernels that PyTorch compiles are kept in ~/.cache/edm2/torch, unless TORCHINDUCTOR_CACHE_DIR names another folder.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from shutil import which
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from backends.pipeline.runs.networks import CACHE
from backends.ports import Compile
from edm2_core.errors import InputError

from .network import Network, UNetBlock

Mode = Literal["default", "max-autotune-no-cudagraphs"]
Answer = Callable[..., Tensor]
_NO_FAULT = (  # what the compiler warns of
    "TensorFloat32 tensor cores",  # sampling does without them, for equal images
    r"\s*Online softmax is disabled",
)


def compile_mode(compile: Compile, device: torch.device, /) -> Mode | None:
    """How torch.compile is called for ``device``; None: not at all.

    Raises:
        InputError: ``compile`` is max, and there is no compiler.
    """
    on_cuda = device.type == "cuda"
    if compile == "off" or (compile == "auto" and not on_cuda):
        return None
    if not (has_triton() if on_cuda else has_cpp()):
        if compile == "auto":
            return None
        raise InputError(f"--compile max needs {'Triton' if on_cuda else 'a C++ compiler'}, got none: install it")
    return "default" if compile == "auto" else "max-autotune-no-cudagraphs"


def has_cpp() -> bool:
    """Whether there is a compiler of C++, which torch.compile writes for a CPU."""
    return any(map(which, (os.environ.get("CXX", "g++"), "clang++", "cl")))


def made_ready(network: nn.Module, device: torch.device, mode: Mode | None, /, *, whole: bool = True) -> None:
    """Lay out the weights as the device's convolutions read them, and compile calls of ``network``, as one graph for
    each size of batch.

    Not ``whole``: each block is compiled by itself, and activations alone are laid out so: the weights of a network
    that will be sharded must be contiguous.
    """
    if device.type in ("cuda", "cpu") and whole:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif isinstance(network, Network):
        network.unet.register_forward_pre_hook(_channels_last)
    if mode is not None:
        for message in _NO_FAULT:
            warnings.filterwarnings("ignore", message)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "torch"))
        for part in (network,) if whole else _blocks(network):
            part.compile(fullgraph=True, dynamic=False, mode=mode)


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, UNetBlock)]


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
