"""Telemetry of a training step: magnitudes of activations, weights and gradients. See
:class:`backends.trainer.Measurement`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from backends.pipeline.runs.telemetry import watched
from backends.trainer import Measurement
from edm2_core import loss as objective

from .network import Layer, Network
from .step import Batch, Learner, Metrics

Arrays = dict[str, mx.array]


def measured_step(
    learner: Learner, batch: Batch, *, lr: float, dropout: mx.array | None = None
) -> tuple[Metrics, Measurement]:
    """:meth:`Learner.step <backends.mlx.step.Learner.step>` on an EDM2 network, and its telemetry."""
    network: Any = learner.network
    names = [name for weights in watched(network.config).values() for name in weights]
    layers = layers_of(network)
    metrics, gradients = learner.gradients(batch, dropout=dropout)
    weights = {name: layers[name].weight for name in names}
    activations, loss, u = forward(network, batch, names, size=learner.microbatch)
    by_row = [{name: _summary(_rms_of_rows(arrays[name])) for name in names} for arrays in (weights, gradients)]
    learner.apply(gradients, lr=lr, images=len(batch.images))
    updates = {
        name: mx.stack([mx.linalg.norm(layers[name].weight - w), mx.linalg.norm(w)]) for name, w in weights.items()
    }
    kinds = (activations, *by_row, updates)
    mx.eval(metrics)
    rows = np.array(mx.stack([mx.stack([kind[name] for name in names]) for kind in kinds]))  # (4, names, 2)
    of_activations, of_weights, of_gradients, of_updates = (dict(zip(names, kind, strict=True)) for kind in rows)
    return metrics, Measurement(
        activations=of_activations,
        weights=of_weights,
        gradients=of_gradients,
        updates=of_updates,
        sigma=np.array(batch.sigma).ravel(),
        loss=np.array(loss),
        u=np.array(u) if network.config.switches.uncertainty else None,
    )


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """The layers of a network by name of their weight."""
    return {f"{name}.weight": layer for name, layer in network.named_modules() if isinstance(layer, Layer)}


def forward(
    network: Network, batch: Batch, names: Sequence[str], *, size: int | None
) -> tuple[Arrays, mx.array, mx.array]:
    """A forward pass without dropout, ``size`` images at a time.

    Returns: of the layers whose weights are ``names``, maximum and mean magnitude of the activations, each [2]; loss
    and u of each image, [N].
    """
    losses, uncertainties = [], []
    with recording(network, names) as activations:
        for part in batch.split(size):
            noisy = part.images + part.unit_noise * part.sigma
            denoised, logvar = network(noisy, part.sigma, part.labels, part.condition)
            weight = objective.weight(part.sigma, sigma_data=network.sigma_data)
            losses.append((weight * (denoised - part.images).square()).mean(axis=(1, 2, 3)))  # (N,)
            uncertainties.append(logvar.reshape(-1))
            mx.eval(losses, uncertainties, activations)  # frees the activations of one part before the next
    summaries = {name: _summary(mx.concatenate(parts)) for name, parts in activations.items()}
    return summaries, mx.concatenate(losses), mx.concatenate(uncertainties)


class Recorder(nn.Module):
    """A layer that keeps the magnitude of each feature of its output, [N, out], of every call in ``magnitudes``."""

    def __init__(self, layer: Layer, magnitudes: list[mx.array]):
        super().__init__()
        self.layer = layer
        self._keep = magnitudes.append

    def __call__(self, x: mx.array, gain: float | mx.array = 1.0, *, factor: float = 1.0) -> mx.array:
        y = self.layer(x, gain, factor=factor)
        own = y.astype(mx.float32) / (factor or 1.0)  # the factor is that of the sum which follows
        square = own.square()
        self._keep(mx.sqrt(square.mean(axis=(1, 2)) if y.ndim == 4 else square))
        return y


@contextmanager
def recording(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[mx.array]]]:
    """Within it, a :class:`Recorder` stands in for each layer whose weight is in ``names``. Yields, by name, the
    magnitudes of each call."""
    layers = {name.removesuffix(".weight"): layer for name, layer in layers_of(network).items() if name in names}
    magnitudes: dict[str, list[mx.array]] = {f"{name}.weight": [] for name in layers}
    recorders = [(name, Recorder(layer, magnitudes[f"{name}.weight"])) for name, layer in layers.items()]
    try:
        network.update_modules(tree_unflatten(recorders))
        yield magnitudes
    finally:
        network.update_modules(tree_unflatten(list(layers.items())))


def _rms_of_rows(x: mx.array) -> mx.array:
    return mx.sqrt(x.reshape(len(x), -1).square().mean(axis=1))


def _summary(magnitudes: mx.array) -> mx.array:
    return mx.stack([magnitudes.max(), magnitudes.mean()])
