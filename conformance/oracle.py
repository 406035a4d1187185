"""Oracles of ports, in float64: the reference's derivatives, a training run written out, and a denoiser to sample with.

Whole gradients are PyTorch's derivative of the reference on float64 tensors. Where PyTorch is not installed, the cases
that need them are reported as not checked.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from conformance import tolerance
from conformance.strategies import Batch, wide
from edm2_core import ema, mp, reference, sampler
from edm2_core.network import NetworkConfig, plan

Params = dict[str, np.ndarray]
GRADIENT_SHARE = 3  # a tensor's share of the error may be that many times its share of the norm


class OracleMissing(Exception):
    """A package that the oracle computes with is not installed."""


def trained_names(config: NetworkConfig) -> list[str]:
    return [name for name, parameter in plan(config).parameters.items() if parameter.trained]


def torch_gradients(config: NetworkConfig, params: Params, batch: Batch) -> tuple[np.ndarray, Params]:
    """The loss of each element and the gradients of loss.sum() / N: the reference, differentiated by PyTorch, in the
    dtype of ``params``."""
    torch, names = _torch(), trained_names(config)
    tensors, inputs = _tensors(params, batch)
    for name in names:
        tensors[name].requires_grad_()
    loss = reference.loss(config, tensors, *inputs)
    gradients = torch.autograd.grad(
        loss.sum() / len(batch.images), [tensors[name] for name in names], materialize_grads=True
    )
    return loss.detach().numpy(), {name: g.numpy() for name, g in zip(names, gradients, strict=True)}


def torch_jvp(
    config: NetworkConfig,
    params: Params,
    x: np.ndarray,
    sigma: np.ndarray,
    labels: Any,
    tangent: np.ndarray,
    condition: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """D and its derivative along ``tangent``: the reference, differentiated by PyTorch, in the dtype of ``params``."""
    torch = _torch()
    tensors, (x, tangent, *rest) = _tensors(params, (x, tangent, sigma, labels, condition))
    answer = torch.func.jvp(lambda x: reference.denoise(config, tensors, x, *rest)[0], (x,), (tangent,))
    return tuple(tensor.numpy() for tensor in answer)


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise OracleMissing("the oracle of derivatives differentiates with PyTorch: install it too") from error
    torch.set_num_threads(1)  # in networks this small, threads mostly wait for each other
    return torch


def _tensors(params: Params, arrays: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
    dtype = getattr(_torch(), str(next(iter(params.values())).dtype))
    tensors = {name: _torch().tensor(value, dtype=dtype) for name, value in params.items()}
    return tensors, [None if array is None else _torch().tensor(array, dtype=dtype) for array in arrays]


class Trained(NamedTuple):
    """The result of a training run, and the float32 error allowed in each loss and in each element of a weight."""

    losses: list[float]
    weights: Params
    averages: dict[float, Params]
    loss_slack: list[float]
    weight_slack: Params
    average_slack: dict[float, Params]


def train(
    config: NetworkConfig,
    params: Params,
    batches: Sequence[Batch],
    *,
    learning_rates: Sequence[float],
    betas: tuple[float, float],
    sigma_rels: Sequence[float],
) -> Trained:
    """Train as STEP-2 says, one step per batch."""
    table, weights = plan(config).parameters, wide(params)
    names = trained_names(config)
    first, second, slack = ({name: np.zeros_like(weights[name]) for name in names} for _ in range(3))
    averages: dict[float, Params] = {s: {} for s in sigma_rels}
    average_slack: dict[float, Params] = {s: {} for s in sigma_rels}
    losses, loss_slack, nimg = [], [], 0
    for step, (batch, lr) in enumerate(zip(batches, learning_rates, strict=True), start=1):
        for name in names:
            if table[name].normalized:
                weights[name] = mp.force_weight_norm(weights[name])
        values, gradients = torch_gradients(config, weights, batch)
        loss = float(values.mean())
        allowed, floor = tolerance.gradient(config, batch.sigma, batch.images), tolerance.gradient_floor(gradients)
        losses.append(loss)
        moved_by = tolerance.gradient_elsewhere(weights, slack)
        moved = sum(float(np.sum(np.abs(gradients[name]) * slack[name])) for name in names)
        loss_slack.append(allowed * max(1.0, abs(loss)) + moved / batch.images[0].size)
        for name in names:
            gradient = gradients[name]
            first[name] = betas[0] * first[name] + (1 - betas[0]) * gradient
            second[name] = betas[1] * second[name] + (1 - betas[1]) * gradient**2
            root = np.sqrt(second[name] / (1 - betas[1] ** step)) + 1e-8
            weights[name] = weights[name] - lr * first[name] / (1 - betas[0] ** step) / root
            error = (GRADIENT_SHARE * allowed + moved_by) * max(float(np.linalg.norm(gradient.ravel())), floor)
            slack[name] = slack[name] + tolerance.adam(gradient, root, lr=lr, error=error)
        nimg += len(batch.images)
        for s in sigma_rels:
            keep = ema.beta(s, t_next=nimg, t_delta=len(batch.images))
            previous = averages[s] or weights
            averages[s] = {name: keep * previous[name] + (1 - keep) * weights[name] for name in weights}
            before = average_slack[s] or slack
            average_slack[s] = {name: keep * before[name] + (1 - keep) * slack[name] for name in names}
    return Trained(losses, weights, averages, loss_slack, slack, average_slack)


def denoiser(config: NetworkConfig, params: Params, labels: Any, condition: Any = None) -> sampler.Denoiser:
    """The reference as a denoiser for the sampler; a network without labels or condition ignores them."""
    exact = wide(params)
    given = wide((labels if config.label_dim else None, condition if config.cond_channels else None))

    def denoise(x: Any, sigma: float) -> Any:
        return reference.denoise(config, exact, x, np.full((len(x), 1, 1, 1), sigma), *given)[0]

    return denoise


def along(config: NetworkConfig, params: Params, batch: Batch, tangent: np.ndarray) -> np.ndarray:
    """The derivative of D along ``tangent``, by central differences of the reference."""
    h = tolerance.STEP
    exact, sigma, rest = wide((params, batch.sigma, batch.rest))
    up, down = (
        reference.denoise(config, exact, wide(batch.noisy) + step * wide(tangent), sigma, *rest)[0] for step in (h, -h)
    )
    return (up - down) / (2 * h)
