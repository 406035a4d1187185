"""Telemetry of a training step: magnitudes of activations, weights and gradients, measured beside the step itself.

:class:`backends.trainer.Measurement` defines each quantity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backends.pipeline.runs.telemetry import watched
from backends.trainer import Measurement
from edm2_core import loss as objective

from .compiling import eagerly
from .denoiser import evaluating
from .network import Layer, Network
from .step import Batch, Learner, forced
from .weights import canonical_names, unwrapped


class Forward(NamedTuple):
    """Of one pass: magnitudes of activations by weight, [2]; loss and u of each image, [N]."""

    activations: dict[str, Tensor]
    loss: Tensor
    u: Tensor


def measured(learner: Learner, batch: Batch, *, lr: float) -> tuple[tuple[Tensor, Tensor], Measurement]:
    """Take a step, exactly as without telemetry: what :meth:`Learner.step` returns, and the measurement."""
    network = unwrapped(learner.network)
    assert isinstance(network, Network)
    names = [name for weights in watched(network.config).values() for name in weights]
    layers = layers_of(network)
    with torch.no_grad():
        before = {name: forced(layers[name]).clone() for name in names}
        forward = measured_forward(network, batch, names, size=learner.microbatch)
    metrics = learner.step(batch, lr=lr)
    with torch.no_grad():
        weights = {name: learner.weights[name] for name in names}
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in weights.items()}
        updates = {name: torch.stack([(weights[name] - w).norm(), w.norm()]) for name, w in before.items()}
        parts = (forward.activations, _by_row(before), _by_row(gradients), updates)
        rows = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).cpu().numpy()
    activations, of_weights, of_gradients, of_updates = (dict(zip(names, part, strict=True)) for part in rows)
    return metrics, Measurement(
        activations=activations,
        weights=of_weights,
        gradients=of_gradients,
        updates=of_updates,
        sigma=batch.sigma.flatten().cpu().numpy(),
        loss=forward.loss.cpu().numpy(),
        u=forward.u.cpu().numpy() if network.config.switches.uncertainty else None,
    )


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """By canonical name of the weight."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Layer)}
    return {f"{name}.weight": layers[own] for own, name in canonical_names(layers).items()}


def measured_forward(network: Network, batch: Batch, names: list[str], *, size: int | None) -> Forward:
    """A forward pass in evaluation mode, ``size`` images at a time."""
    losses, uncertainties = [], []
    with evaluating(network), eagerly(), recording(network, names) as activations:
        for part in batch.split(size):
            noisy = part.images + part.unit_noise * part.sigma
            denoised, logvar = network(noisy, part.sigma, part.labels, part.condition)
            weight = objective.weight(part.sigma, sigma_data=network.sigma_data)
            losses.append((weight * (denoised - part.images).square()).flatten(1).mean(dim=1))
            uncertainties.append(logvar.flatten())
    summed = {name: _summary(torch.cat(parts)) for name, parts in activations.items()}
    return Forward(summed, torch.cat(losses), torch.cat(uncertainties))


@contextmanager
def recording(network: Network, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, each call of a layer in ``names`` adds the magnitudes, [images, features], of its output."""
    layers = layers_of(network)
    activations: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [layers[name].register_forward_hook(_record(activations[name])) for name in names]
    try:
        yield activations
    finally:
        for hook in hooks:
            hook.remove()


def _record(magnitudes: list[Tensor]) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, Layer)
        magnitudes.append(_magnitudes(output / (layer.factor or 1.0), 2))  # the layer's own output

    return hook


def _magnitudes(x: Tensor, kept: int) -> Tensor:
    """Root mean square over all axes but the first ``kept``, float32."""
    return x.float().flatten(kept).square().mean(dim=-1).sqrt() if x.ndim > kept else x.float().abs()


def _summary(magnitudes: Tensor) -> Tensor:
    return torch.stack([magnitudes.max(), magnitudes.mean()])


def _by_row(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _summary(_magnitudes(array, 1)) for name, array in arrays.items()}
