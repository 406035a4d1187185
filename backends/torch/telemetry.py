"""What a training step is made of, measured beside it: see :mod:`backends.pipeline.runs.telemetry`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backends.pipeline.runs.telemetry import Measurement, watched
from edm2_core import loss as objective

from .network import Layer, Network
from .step import Batch, Training, forced
from .weights import canonical_name, unwrapped


class Forward(NamedTuple):
    """Of one pass: magnitudes of activations by weight, [2]; loss and u of each image, [N]."""

    activations: dict[str, Tensor]
    loss: Tensor
    u: Tensor


def measured(training: Training, batch: Batch, *, lr: float) -> tuple[tuple[Tensor, Tensor], Measurement]:
    """A step on ``batch``, what it returns, and what it was made of. The step is the same as without."""
    network = unwrapped(training.network)
    names = [name for weights in watched(network.config).values() for name in weights]
    layers = layers_of(network)
    with torch.no_grad():
        before = {name: forced(layers[name]).clone() for name in names}
        forward = watch(network, batch, names, size=training.microbatch)
    metrics = training.step(batch, lr=lr)
    with torch.no_grad():
        weights = {name: training.weights[name] for name in names}
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in weights.items()}
        updates = {name: torch.stack([(weights[name] - w).norm(), w.norm()]) for name, w in before.items()}
        parts = (forward.activations, _by_row(before), _by_row(gradients), updates)
        rows = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).cpu().numpy()
    activations, of_weights, of_gradients, steps = (dict(zip(names, part, strict=True)) for part in rows)
    return metrics, Measurement(
        activations=activations,
        weights=of_weights,
        gradients=of_gradients,
        updates=steps,
        sigma=batch.sigma.flatten().cpu().numpy(),
        loss=forward.loss.cpu().numpy(),
        u=forward.u.cpu().numpy() if network.config.switches.uncertainty else None,
    )


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """By canonical name of the weight."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Layer)}
    return {f"{canonical_name(name)}.weight": layer for name, layer in layers.items()}


def watch(network: Network, batch: Batch, names: list[str], *, size: int | None) -> Forward:
    """A forward pass in evaluation mode, ``size`` images at a time; the mode is left as it was."""
    activations: dict[str, list[Tensor]] = {name: [] for name in names}
    losses, uncertainties = [], []
    training = network.training
    network.eval()
    try:
        with watching(network, activations):
            for part in batch.split(size):
                denoised, logvar = network(part.images + part.unit_noise * part.sigma, part.sigma, part.labels)
                weight = objective.weight(part.sigma, sigma_data=network.config.sigma_data)
                losses.append((weight * (denoised - part.images).square()).mean(dim=(1, 2, 3)))
                uncertainties.append(logvar.flatten())
    finally:
        network.train(training)
    summed = {name: _summary(torch.cat(parts)) for name, parts in activations.items()}
    return Forward(summed, torch.cat(losses), torch.cat(uncertainties))


@contextmanager
def watching(network: Network, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Within it, each layer that ``found`` names adds the magnitudes, [images, features], of what it puts out."""
    layers = {name: layer for name, layer in layers_of(network).items() if name in found}
    try:
        for name, layer in layers.items():
            layer.watch = partial(_keep, found[name])
        yield
    finally:
        for layer in layers.values():
            layer.watch = None


def _keep(found: list[Tensor], y: Tensor) -> None:
    found.append(_magnitudes(y, 2))


def _magnitudes(x: Tensor, kept: int) -> Tensor:
    """Root mean square over all axes but the first ``kept``, float32."""
    return x.float().flatten(kept).square().mean(dim=-1).sqrt() if x.ndim > kept else x.float().abs()


def _summary(magnitudes: Tensor) -> Tensor:
    return torch.stack([magnitudes.max(), magnitudes.mean()])


def _by_row(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _summary(_magnitudes(array, 1)) for name, array in arrays.items()}
