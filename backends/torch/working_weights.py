"""The weights that the layers of a network multiply with, computed once a step, and the derivative of that.

They are the stored weights, normalized and scaled (Eq. 47); the network's own graph sees them as its parameters. So a
batch in parts normalizes once, messages between processes are sent while the backward pass runs, and torch.compile has
fewer operations to arrange.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .network import Layer, inverse_norm

Function = Callable[..., Tensor]
_EPS = 1e-4  # of inverse_norm


@torch.no_grad()
def force(rows: Tensor) -> None:
    """Put rows back on their sphere, in place. Source: Eq. 66."""
    rows.mul_(inverse_norm(rows, (1,)))


@torch.no_grad()
def compute(stored: Tensor, working: Tensor, scale: Tensor, *, forced: bool, normalized: bool) -> Tensor:
    """Fill ``working`` from ``stored``, which is first put back on its spheres if ``forced``; both [out, fan_in].

    Returns the root mean square of each row, [out, 1].
    """
    if forced:
        force(stored)
    rms = root_mean_square(stored)
    torch.mul(stored, scale / (rms + _EPS) if normalized else scale, out=working)
    return rms


@torch.no_grad()
def derivative(stored: Tensor, rms: Tensor, gradient: Tensor, scale: Tensor, *, normalized: bool) -> Tensor:
    """The gradient by ``stored`` from that by what :func:`compute` made of it; all [out, fan_in]."""
    if not normalized:
        return gradient * scale
    factor = scale / (rms + _EPS)
    along = (gradient * stored).mean(dim=1, keepdim=True)  # 0 where a row is 0
    return torch.addcmul(gradient * factor, stored, along * factor / (rms + _EPS) / rms.clamp(min=1e-30), value=-1)


def root_mean_square(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norm * rows.shape[1] ** -0.5


def rows(weight: Tensor) -> Tensor:
    """A weight [out, ...] as [out, fan_in], sharing its memory, in whatever order that lies."""
    lies = weight.detach() if weight.is_contiguous() else weight.detach().movedim(1, -1)
    return lies.view(len(weight), -1)


def from_rows(values: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`rows`: shaped like a weight, and laid out as it is."""
    if like.is_contiguous():
        return values.view_as(like)
    return values.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


class WorkingWeights:
    """Those of all layers in ``network``; ``parameters`` are what its graph sees in place of the stored weights.

    With ``compiles``, both functions are compiled, once for layers of all sizes.
    """

    def __init__(self, network: nn.Module, *, compiles: bool = False):
        self.layers = [layer for layer in network.modules() if isinstance(layer, Layer)]
        self.parameters = [nn.Parameter(torch.empty_like(layer.weight)) for layer in self.layers]
        self._scales = [torch.tensor(layer.scale, device=layer.weight.device) for layer in self.layers]
        self._rms: list[Tensor] = []
        self._compute: Function = _compiled(compute) if compiles else compute
        self._derivative: Function = _compiled(derivative) if compiles else derivative

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Force the stored weights, and within it let the layers use what is computed from them."""
        parts = list(zip(self.layers, self.parameters, self._scales, strict=True))
        self._rms = [
            self._compute(rows(layer.weight), rows(working), scale, forced=layer.forced, normalized=layer.normalized)
            for layer, working, scale in parts
        ]
        try:
            for layer, working, _ in parts:
                layer.working, working.grad = (working,), None
            yield
        finally:
            for layer in self.layers:
                layer.working = None

    def pull_gradients(self) -> None:
        """Give the stored weights the gradients that belong to those of the working ones, which are dropped."""
        for layer, working, scale, rms in zip(self.layers, self.parameters, self._scales, self._rms, strict=True):
            if working.grad is not None:
                stored = rows(layer.weight)
                gradient = self._derivative(stored, rms, rows(working.grad), scale, normalized=layer.normalized)
                layer.weight.grad, working.grad = from_rows(gradient, layer.weight), None


def _compiled(function: Function) -> Function:
    compiled: Function = torch.compile(function, dynamic=True)
    return compiled


class Shared(nn.Module):
    """``module``, whose parameters are taken to be ``trained`` and nothing else: what DDP sees of a network."""

    module: nn.Module

    def __init__(self, module: nn.Module, trained: Iterable[Tensor]):
        super().__init__()
        self.trained = nn.ParameterList(trained)  # the same tensors, which are parameters
        self.__dict__["module"] = module  # unregistered

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)
