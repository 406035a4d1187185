"""What a training step is made of, measured beside it: see :mod:`backends.pipeline.runs.telemetry`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np

from backends.pipeline.runs.telemetry import Measurement, watched
from edm2_core import loss as objective

from .network import Layer, Network
from .step import Batch, Training, forced

Arrays = dict[str, mx.array]


def measured(
    training: Training, batch: Batch, *, lr: float, dropout: mx.array | None
) -> tuple[tuple[mx.array, mx.array], Measurement]:
    """A step on ``batch``, what it returns, and what it was made of. The step is the same as without.

    Gradients are those that Adam's first moment took in: it is all that a step keeps of them.
    """
    network = training.network
    names = [name for weights in watched(network.config).values() for name in weights]
    layers = layers_of(network)
    before = {name: forced(layers[name]) for name in names}
    moments = {name: training.moments[name]["m"] for name in names}
    activations, loss, u = watch(network, batch, names, size=training.microbatch)
    metrics = training.step(batch, lr=lr, dropout=dropout)
    keep = training.betas[0]
    gradients = {name: (training.moments[name]["m"] - keep * m) / (1 - keep) for name, m in moments.items()}
    updates = {
        name: mx.stack([mx.linalg.norm(layers[name].weight - w), mx.linalg.norm(w)]) for name, w in before.items()
    }
    parts = (activations, _by_row(before), _by_row(gradients), updates)
    rows = np.array(mx.stack([mx.stack([part[name] for name in names]) for part in parts]))
    of_activations, of_weights, of_gradients, steps = (dict(zip(names, part, strict=True)) for part in rows)
    return metrics, Measurement(
        activations=of_activations,
        weights=of_weights,
        gradients=of_gradients,
        updates=steps,
        sigma=np.array(batch.sigma).ravel(),
        loss=np.array(loss),
        u=np.array(u) if network.config.switches.uncertainty else None,
    )


def layers_of(network: Network) -> dict[str, Layer]:
    """By name of the weight."""
    return {f"{name}.weight": layer for name, layer in network.named_modules() if isinstance(layer, Layer)}


def watch(network: Network, batch: Batch, names: list[str], *, size: int | None) -> tuple[Arrays, mx.array, mx.array]:
    """A forward pass without dropout, ``size`` images at a time: magnitudes of activations by weight, [2]; loss and u
    of each image, [N]."""
    activations: dict[str, list[mx.array]] = {name: [] for name in names}
    losses, uncertainties = [], []
    with watching(network, activations):
        for part in batch.split(size):
            denoised, logvar = network(part.images + part.unit_noise * part.sigma, part.sigma, part.labels)
            weight = objective.weight(part.sigma, sigma_data=network.config.sigma_data)
            losses.append((weight * (denoised - part.images).square()).mean(axis=(1, 2, 3)))
            uncertainties.append(logvar.reshape(-1))
            mx.eval(losses, uncertainties, activations)  # before the next part, whose memory shall be free
    summed = {name: _summary(mx.concatenate(parts)) for name, parts in activations.items()}
    return summed, mx.concatenate(losses), mx.concatenate(uncertainties)


@contextmanager
def watching(network: Network, found: dict[str, list[mx.array]]) -> Iterator[None]:
    """Within it, each layer that ``found`` names adds the magnitudes, [images, features], of what it puts out."""
    layers = {name: layer for name, layer in layers_of(network).items() if name in found}
    try:
        for name, layer in layers.items():
            layer.watch = partial(_keep, found[name])
        yield
    finally:
        for layer in layers.values():
            layer.watch = None


def _keep(found: list[mx.array], y: mx.array) -> None:
    square = y.astype(mx.float32).square()
    found.append(mx.sqrt(square.mean(axis=(1, 2)) if y.ndim == 4 else square))


def _summary(magnitudes: mx.array) -> mx.array:
    return mx.stack([magnitudes.max(), magnitudes.mean()])


def _by_row(arrays: Arrays) -> Arrays:
    return {name: _summary(mx.sqrt(x.reshape(len(x), -1).square().mean(axis=1))) for name, x in arrays.items()}
