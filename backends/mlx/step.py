"""One training step, and the state that it moves.

The order matters (SPEC STEP): force the stored weights onto their spheres; loss and gradients through the
normalization; gradients made finite; Adam; averages of the stored weights, after Adam and before the next forcing.

Three functions do it, compiled with their state named: forcing, the gradients of a part of the batch, and the update.
Parameters, moments and averages are evaluated at the end of each step, so that no graph outlives it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_flatten, tree_unflatten

from backends.pipeline.checkpoints.states import State
from edm2_core import loss as objective
from edm2_core.ema import beta

from .device import Processes, compiled
from .ema import PowerEMA, moved
from .network import Layer, Network, fan_axes, normalize
from .weights import dump, load, tensors, to_native

Gradients = dict[str, mx.array]  # by name, of what is trained


class Batch(NamedTuple):
    """images and unit_noise [N, H, W, C], sigma [N, 1, 1, 1], labels [N, label_dim] or None; all float32."""

    images: mx.array
    unit_noise: mx.array
    sigma: mx.array
    labels: mx.array | None = None

    def split(self, size: int | None) -> "Iterator[Batch]":
        """This batch in parts of ``size`` images, the last maybe smaller; None: in one."""
        size = size or len(self.images)
        for start in range(0, len(self.images), size):
            parts: list[Any] = [None if x is None else x[start : start + size] for x in self]
            yield Batch(*parts)


def batch_loss(network: Network, batch: Batch, *, dropout: mx.array | None = None) -> mx.array:
    """The loss of each element, [N, H, W, C], float32. Source: Eq. 21."""
    noisy = batch.images + batch.unit_noise * batch.sigma
    denoised, logvar = network(noisy, batch.sigma, batch.labels, dropout=dropout)
    return objective.loss(denoised, batch.images, batch.sigma, logvar, sigma_data=network.config.sigma_data)


def gradients_of(
    network: Network, batch: Batch, *, scale: float, dropout: mx.array | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss of each element, and by name the gradients of ``scale`` times its sum."""

    def scaled(params: Any) -> tuple[mx.array, mx.array]:
        network.update(params)
        loss = batch_loss(network, batch, dropout=dropout)
        return loss.sum() * scale, loss

    stored = network.trainable_parameters()
    (_, loss), gradients = mx.value_and_grad(scaled)(stored)
    network.update(stored)
    return loss, dict(tree_flatten(gradients))


def force_weight_norm(network: Network) -> None:
    """Put the stored weights back on their spheres, on rungs that do. Source: Eq. 66."""
    for layer in network.modules():
        if isinstance(layer, Layer) and layer.forced:
            layer.weight = forced(layer)


def forced(layer: Layer) -> mx.array:
    """The weight that a step begins with."""
    return normalize(layer.weight, fan_axes(layer.weight)) if layer.forced else layer.weight


def zero_nonfinite(gradients: Gradients) -> tuple[Gradients, mx.array]:
    """``gradients`` with infinities and NaN replaced by 0, and how many there were."""
    finite = {name: mx.isfinite(g) for name, g in gradients.items()}
    count = mx.stack([mx.sum(~there) for there in finite.values()]).sum()
    return {name: mx.where(finite[name], g, 0) for name, g in gradients.items()}, count


class Training:
    """A network in training: Adam, averages, and the clock in images.

    Args:
        network: computes where MLX does when a step is called.
        betas: of Adam, eps 1e-8.
        sigma_rels: lengths of the averages.
        loss_scaling: the loss is multiplied, its gradients divided by it: lifts float16 gradients above underflow.
        microbatch: images per forward pass; larger batches accumulate gradients.
        processes: who share each batch, each with an equal part; None: this one alone.
    """

    def __init__(
        self,
        network: Network,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        sigma_rels: Sequence[float] = (0.05, 0.10),
        loss_scaling: float = 1.0,
        microbatch: int | None = None,
        processes: Processes | None = None,
    ):
        self.network, self.betas = network, betas
        self.loss_scaling, self.microbatch = loss_scaling, microbatch
        self.processes = processes or Processes()
        self.optimizer = optimizers.Adam(0.0, betas=list(betas), eps=1e-8, bias_correction=True)
        self.optimizer.init(network.trainable_parameters())
        self.ema = PowerEMA(network, sigma_rels=sigma_rels)
        self.steps = 0
        averages = list(self.ema.averages.values())
        self._state = [network, self.optimizer.state, averages]
        self._force = compiled(partial(force_weight_norm, network), inputs=[network], outputs=[network])
        self._gradients = compiled(self._part, inputs=[network], outputs=[])
        self._update = compiled(partial(self._move, averages), inputs=self._state, outputs=self._state)

    @property
    def nimg(self) -> int:
        return self.ema.time

    def step(self, batch: Batch, *, lr: float, dropout: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Train on this process's share of a batch. Returns its mean loss per element and the number of non-finite
        gradient elements that were zeroed. ``dropout``: a key, for a network that drops."""
        count = len(batch.images)
        total = count * self.processes.world
        self._force()
        parts = list(batch.split(self.microbatch))
        keys = [None] * len(parts) if dropout is None else mx.random.split(dropout, len(parts))
        loss, gradients = self._gradients(count, keys[0], *parts[0])
        for part, key in zip(parts[1:], keys[1:], strict=True):
            mx.eval(loss, gradients)  # before the next part, whose activations shall find their memory free
            more, others = self._gradients(count, key, *part)
            loss, gradients = loss + more, {name: g + others[name] for name, g in gradients.items()}
        gradients = self.processes.average(gradients)
        time = self.nimg + total
        shares = [1 - beta(s, t_next=time, t_delta=total) for s in self.ema.averages]
        self.optimizer.learning_rate = lr
        nonfinite = self._update(gradients, mx.array(shares))
        mx.eval(loss, nonfinite, self._state)
        self.ema.time = time
        self.steps += 1
        return loss / batch.images.size, nonfinite

    def _part(self, count: int, key: mx.array | None, *arrays: Any) -> tuple[mx.array, Gradients]:
        """The summed loss of a part of ``count`` images, and its share of the gradients of the mean, scaled."""
        batch = Batch(*arrays)  # a compiled function is given plain tuples
        loss, gradients = gradients_of(self.network, batch, scale=self.loss_scaling / count, dropout=key)
        return loss.sum(), gradients

    def _move(self, averages: list[dict[str, mx.array]], gradients: Gradients, shares: mx.array) -> mx.array:
        gradients, nonfinite = zero_nonfinite({name: g / self.loss_scaling for name, g in gradients.items()})
        self.optimizer.update(self.network, tree_unflatten(list(gradients.items())))
        weights = tensors(self.network)
        for average, share in zip(averages, shares, strict=True):
            for name, array in average.items():
                average[name] = moved(array, weights[name], share)
        return nonfinite

    def state(self) -> State:
        """Everything that training goes on from, in the canonical form that all ports share."""
        first, second = (dump({name: pair[which] for name, pair in self.moments.items()}) for which in ("m", "v"))
        return State(
            params=dump(tensors(self.network)),
            moments1=first,
            moments2=second,
            averages={s: dump(self.ema.arrays(s)) for s in self.ema.averages},
            nimg=self.nimg,
            steps=self.steps,
        )

    def load_state(self, state: State) -> None:
        """Go on from ``state``, whichever port wrote it."""
        load(self.network, state.params)
        for name, pair in self.moments.items():
            pair |= {"m": to_native(state.moments1[name]), "v": to_native(state.moments2[name])}
        self.optimizer.state["step"] = mx.array(state.steps, mx.uint64)
        for sigma_rel, average in self.ema.averages.items():
            average.update({name: to_native(state.averages[sigma_rel][name]) for name in average})
        mx.eval(self._state)
        self.ema.time, self.steps = state.nimg, state.steps

    @property
    def moments(self) -> dict[str, dict[str, mx.array]]:
        """Adam's pair of each trained parameter, by name: the optimizer's own, to read and to write."""
        found: Any = tree_flatten(self.optimizer.state, is_leaf=lambda node: isinstance(node, dict) and "m" in node)
        return {name: pair for name, pair in found if isinstance(pair, dict)}
