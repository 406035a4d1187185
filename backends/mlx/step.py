"""A training step, and the learner whose state it advances.

    learner = Learner(denoiser, sigma_rels=(0.05, 0.10))
    loss, nonfinite = learner.step(batch, lr=0.01)

Order of a step (SPEC STEP): force the stored weights onto their spheres; compute the loss, and gradients through the
normalization; zero non-finite gradient elements; Adam; average the stored weights, after Adam and before they are
forced again.

On a GPU each part is compiled, with the state that it changes named. Nothing is evaluated before the end of the step,
except what gradient accumulation needs; then everything is, so that no graph outlives its step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten

from edm2_core import loss as objective
from edm2_core.ema import LengthLike
from edm2_core.state import Arrays, State

from .denoiser import Denoiser
from .device import Processes, compiled
from .ema import PowerEMA
from .network import Layer, fan_axes, normalize
from .weights import dump, load, tensors, to_native

Gradients = dict[str, mx.array]
"""By name, of what is trained."""
Metrics = tuple[mx.array, mx.array]
"""Mean loss per element, and the number of gradient elements that were not finite and have been zeroed; 0-d."""


class Batch(NamedTuple):
    """images and unit_noise [N, ...], sigma [N, 1, ...], labels [N, label_dim] or None, condition
    [N, ..., cond_channels] or None; all float32."""

    images: mx.array
    unit_noise: mx.array
    sigma: mx.array
    labels: mx.array | None = None
    condition: mx.array | None = None

    def split(self, size: int | None) -> "Iterator[Batch]":
        """This batch in parts of ``size`` images, the last maybe smaller; None: in one."""
        size = size or len(self.images)
        for start in range(0, len(self.images), size):
            parts: list[Any] = [None if x is None else x[start : start + size] for x in self]
            yield Batch(*parts)


def batch_loss(network: Denoiser, batch: Batch, *, dropout: mx.array | None = None) -> mx.array:
    """The loss of each element, [N, ...] like the images, float32. Source: Eq. 21. ``dropout``: keys [N, 2], one an
    image, or None."""
    noisy = batch.images + batch.unit_noise * batch.sigma
    denoised, logvar = network(noisy, batch.sigma, batch.labels, batch.condition, dropout=dropout)
    return objective.loss(denoised, batch.images, batch.sigma, logvar, sigma_data=network.sigma_data)


def gradients_of(
    network: Denoiser, batch: Batch, *, scale: float, dropout: mx.array | None = None
) -> tuple[mx.array, Gradients]:
    """The loss of each element, and the gradients of ``scale`` times its sum. ``network`` stays as it is."""

    def scaled() -> tuple[mx.array, mx.array]:
        loss = batch_loss(network, batch, dropout=dropout)
        return loss.sum() * scale, loss

    stored = network.trainable_parameters()
    (_, loss), gradients = nn.value_and_grad(network, scaled)()
    network.update(stored)  # in their place nn.value_and_grad leaves the arrays that it traced
    return loss, dict(tree_flatten(gradients))


def force_weight_norm(network: nn.Module) -> None:
    """Put the stored weights of all EDM2 layers back on their spheres, on rungs that do. Source: Eq. 66."""
    for layer in network.modules():
        if isinstance(layer, Layer) and layer.forced:
            layer.weight = normalize(layer.weight, fan_axes(layer.weight))


@contextmanager
def normalized_once(network: nn.Module) -> Iterator[Callable[[Gradients], Gradients]]:
    """Within it, EDM2 layers hold the weights that they multiply with, and normalize no more. It yields a function from
    the gradients with respect to those to the gradients with respect to the stored ones."""
    layers = {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, Layer) and m.normalized}
    stored = {name: layer.weight for name, layer in layers.items()}

    def unit(weight: mx.array) -> mx.array:
        return normalize(weight, fan_axes(weight))

    def pull(gradients: Gradients) -> Gradients:
        found = {name: mx.vjp(unit, [weight], [gradients[name]])[1][0] for name, weight in stored.items()}
        return gradients | found

    try:
        for layer in layers.values():
            layer.weight, layer.normalized = unit(layer.weight), False
        yield pull
    finally:
        for name, layer in layers.items():
            layer.weight, layer.normalized = stored[name], True


class Learner:
    """A denoiser with all that its training needs: Adam, averages of its weights, and the clock in images.

    Args:
        network: any :class:`~.denoiser.Denoiser`. It computes on MLX's default device.
        betas: of Adam, whose eps is 1e-8.
        sigma_rels: lengths of the averages.
        loss_scaling: factor on the loss while gradients are computed; keeps float16 gradients from underflow.
        microbatch: images per forward pass; larger batches accumulate gradients. Default: the whole batch.
        frozen: names of the weights that are not trained: their gradients are 0.
        processes: the processes that share each batch, each with an equal part. Default: this one alone.
    """

    def __init__(
        self,
        network: Denoiser,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        sigma_rels: Sequence[LengthLike] = (0.05, 0.10),
        loss_scaling: float = 1.0,
        microbatch: int | None = None,
        processes: Processes | None = None,
        frozen: Collection[str] = (),
    ):
        self.network, self.loss_scaling, self.microbatch = network, loss_scaling, microbatch
        self.processes, self.frozen = processes or Processes(), frozenset(frozen)
        self.optimizer = optimizers.Adam(0.0, betas=list(betas), eps=1e-8, bias_correction=True)
        self.optimizer.init(network.trainable_parameters())
        self.ema = PowerEMA(network, sigma_rels=sigma_rels)
        self._state, self.updating = [network, self.optimizer.state], False
        self._force = compiled(partial(force_weight_norm, network), inputs=[network], outputs=[network])
        self._whole_gradients = compiled(self._gradients_of_part, inputs=[network])
        self._part_gradients = compiled(self._gradients_of_part, inputs=[network])  # within normalized_once
        self._finite = compiled(self._zero_nonfinite)
        self._adam = compiled(self._apply_adam, inputs=self._state, outputs=self._state)

    @property
    def nimg(self) -> int:
        """Images seen: the clock of the averages."""
        return self.ema.time

    def step(self, batch: Batch, *, lr: float, dropout: mx.array | None = None) -> Metrics:
        """Train on this process's share of a batch. ``dropout``: a key for each image, [N, 2], for a network with
        dropout: what is dropped of an image does not depend on how the batch is divided."""
        metrics, gradients = self.gradients(batch, dropout=dropout)
        self.apply(gradients, lr=lr, images=len(batch.images))
        mx.eval(metrics)
        return metrics

    def gradients(self, batch: Batch, *, dropout: mx.array | None = None) -> tuple[Metrics, Gradients]:
        """The first half of a step: force the weights; the gradients as Adam receives them, that is their mean over
        processes, finite, without the loss scaling."""
        self._force()
        count, parts = len(batch.images), list(batch.split(self.microbatch))
        size = len(parts[0].images)
        keys = [None if dropout is None else dropout[i * size : (i + 1) * size] for i in range(len(parts))]
        if len(parts) == 1:
            loss, gradients = self._whole_gradients(count, keys[0], *batch)
        else:
            with normalized_once(self.network) as pull:
                loss, gradients = self._part_gradients(count, keys[0], *parts[0])
                for part, key in zip(parts[1:], keys[1:], strict=True):
                    mx.eval(loss, gradients)  # frees the activations of one part before the next
                    more, others = self._part_gradients(count, key, *part)
                    loss, gradients = loss + more, {name: g + others[name] for name, g in gradients.items()}
                gradients = pull(gradients)
        gradients, nonfinite = self._finite(self.processes.average(gradients))
        return (loss / batch.images.size, nonfinite), gradients

    def apply(self, gradients: Gradients, /, *, lr: float, images: int) -> None:
        """The second half: Adam, and the averages. ``images`` is this process's share of the batch."""
        self.optimizer.learning_rate = lr
        self.updating = True  # stays, if the memory is exhausted half-way
        self._adam(gradients)
        total = images * self.processes.world
        self.ema.update(time=self.nimg + total, delta=total)
        mx.eval(self._state)
        self.updating = False

    def _gradients_of_part(self, count: int, key: mx.array | None, *arrays: Any) -> tuple[mx.array, Gradients]:
        """The summed loss of a part of ``count`` images, and its share of the gradients of the mean, scaled."""
        batch = Batch(*arrays)  # compiled functions take plain tuples
        loss, gradients = gradients_of(self.network, batch, scale=self.loss_scaling / count, dropout=key)
        return loss.sum(), gradients

    def _zero_nonfinite(self, gradients: Gradients) -> tuple[Gradients, mx.array]:
        """Gradients without the loss scaling; infinities, NaN and what overflows in Adam (SPEC STEP-2) replaced by 0,
        and how many there were."""
        plain = {name: g / self.loss_scaling for name, g in gradients.items()}
        fits = {name: mx.abs(g) < objective.LARGEST_GRADIENT for name, g in plain.items()}  # NaN is not less
        count = mx.stack([mx.sum(~there) for there in fits.values()]).sum()
        kept = {name: mx.where(fits[name], g, 0) for name, g in plain.items()}
        return {name: mx.zeros_like(g) if name in self.frozen else g for name, g in kept.items()}, count

    def _apply_adam(self, gradients: Gradients) -> None:
        self.optimizer.update(self.network, tree_unflatten(list(gradients.items())))

    def state(self, names: Collection[str] | None = None, /) -> State:
        """What training continues from, in the canonical form that all ports share: everything, or what belongs to the
        parameters ``names``."""

        def some(values: Mapping[str, mx.array]) -> Arrays:
            return dump(values, names)

        moments = self.moments
        return State(
            params=some(tensors(self.network)),
            moments1=some({name: pair["m"] for name, pair in moments.items()}),
            moments2=some({name: pair["v"] for name, pair in moments.items()}),
            averages={length: some(self.ema.arrays(length)) for length in self.ema.averages},
            nimg=self.nimg,
            steps=int(self.optimizer.step),
        )

    def load_state(self, state: State) -> None:
        """Continue from ``state``, whichever port wrote it."""
        load(self.network, state.params)
        for name, pair in self.moments.items():
            pair |= {"m": to_native(state.moments1[name]), "v": to_native(state.moments2[name])}
        self.optimizer.state["step"] = mx.array(state.steps, mx.uint64)
        averages = {
            f"{length.key}/{name}": to_native(arrays[name])
            for length, arrays in state.averages.items()
            for name in state.moments1  # constants are not averaged
        }
        self.ema.load_state_dict({"time": mx.array(state.nimg, mx.int64), **averages})
        mx.eval(self._state)

    @property
    def moments(self) -> Mapping[str, dict[str, mx.array]]:
        """Adam's running means ``m`` and ``v`` of each trained parameter, by name: the optimizer's own dicts."""
        leaves: Any = tree_flatten(self.optimizer.state, is_leaf=_is_moments)
        return {name: node for name, node in leaves if _is_moments(node)}


def _is_moments(node: Any) -> bool:
    return isinstance(node, dict) and node.keys() == {"m", "v"} and isinstance(node["m"], mx.array)
