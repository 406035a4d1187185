"""The adapter through which the conformance suite, and anything else that speaks NumPy, drives this port."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import mlx.core as mx
import numpy as np

from backends.pipeline.checkpoints.states import State
from backends.ports import Guide, Params, Sampling
from edm2_core import sampler
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from . import device as devices
from .network import Network
from .step import Batch, Training, gradients_of
from .weights import build, dump, to_nchw, to_nhwc


@dataclass(frozen=True)
class Port(Sampling):
    """NumPy in, NumPy out: images NCHW, labels one-hot [N, label_dim] or None, sigma [N, 1, 1, 1], params canonical.

    All computations run on ``device`` (gpu or cpu; None: the faster there is), with activations in ``precision``.

    Raises:
        InputError: no such device here, or a precision that networks are not computed in, such as float64.
    """

    device: str | None = None
    precision: str = "float32"
    name: str = "mlx"

    def __post_init__(self) -> None:
        devices.choose(self.device)
        devices.arithmetic(self.precision)

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """denoised [N, C, H, W] and logvar [N, 1, 1, 1]. See :func:`edm2_core.reference.denoise`."""
        with self._place():
            denoised, logvar = self._network(config, params)(to_nhwc(x), _array(sigma), _array(labels))
            return to_nchw(denoised), np.array(logvar)

    def loss_and_gradients(
        self,
        config: NetworkConfig,
        params: Params,
        images: np.ndarray,
        unit_noise: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The loss of each element, and the gradients of loss.sum() / N with the stored weights as they are."""
        with self._place():
            network, batch = self._network(config, params), _batch(images, unit_noise, sigma, labels)
            loss, gradients = gradients_of(network, batch, scale=1 / len(images))
            return to_nchw(loss), dump(gradients)

    def jvp(
        self,
        config: NetworkConfig,
        params: Params,
        x: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None,
        tangent: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The denoised images, and their derivative along ``tangent``, both [N, C, H, W]."""
        with self._place(), mx.stream(mx.cpu):  # conv2d has no forward derivative on the GPU
            network, level, classes = self._network(config, params), _array(sigma), _array(labels)
            pair = mx.jvp(lambda moved: network(moved, level, classes)[0], [to_nhwc(x)], [to_nhwc(tangent)])
            denoised, along = (to_nchw(arrays[0]) for arrays in pair)
        return denoised, along

    def train(
        self,
        config: NetworkConfig,
        params: Params,
        batches: Iterable[Sequence[np.ndarray | None]],
        *,
        learning_rates: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.99),
        sigma_rels: Sequence[float] = (0.05, 0.10),
    ) -> tuple[list[float], Params, Mapping[float, Params]]:
        """One step per batch (images, unit_noise, sigma, labels): mean losses, last parameters and averages."""
        with self._place():
            training = Training(self._network(config, params), betas=betas, sigma_rels=sigma_rels)
            losses = _steps(training, batches, learning_rates)
            state = training.state()
        return losses, state.params, state.averages

    def advance(
        self,
        config: NetworkConfig,
        state: State,
        batches: Iterable[Sequence[np.ndarray | None]],
        *,
        learning_rates: Sequence[float],
    ) -> tuple[list[float], State]:
        """Steps from ``state`` on, Adam's betas (0.9, 0.99): mean losses, and the state that they come to."""
        with self._place():
            training = Training(self._network(config, state.params), sigma_rels=tuple(state.averages))
            training.load_state(state)
            return _steps(training, batches, learning_rates), training.state()

    def variants(self) -> dict[str, "Port"]:
        """This port in other precision, and on the GPU if there is one."""
        devices = {"gpu": replace(self, device="gpu")} if mx.is_available(mx.gpu) else {}
        return devices | {name: replace(self, precision=name) for name in ("bfloat16", "float16")}

    def sampler(self, config: NetworkConfig, params: Params, *, guide: Guide | None = None) -> "Sampler":
        """A sampler that keeps its networks: call it for batch after batch."""
        with self._place():
            net = self._runnable(config, params)
            if guide is None:
                return Sampler(self, net, None)
            guide_config, guide_params = (config, guide) if isinstance(guide, Mapping) else guide
            return Sampler(self, net, self._runnable(guide_config, guide_params))

    def _network(self, config: NetworkConfig, params: Params) -> Network:
        return build(config, params, dtype=devices.arithmetic(self.precision))

    def _runnable(self, config: NetworkConfig, params: Params) -> "Runnable":
        network = self._network(config, params)
        return Runnable(devices.compiled(network, inputs=[network]), labelled=config.label_dim > 0)

    def _place(self) -> Any:
        return mx.stream(devices.choose(self.device))


@dataclass(frozen=True)
class Runnable:
    """A network ready to be called, and whether it takes labels."""

    network: Callable[..., tuple[mx.array, mx.array]]
    labelled: bool

    def with_labels(self, labels: mx.array | None) -> sampler.Denoiser:
        """As the sampler wants it; an unconditional one does without the labels. Each answer is evaluated, so that no
        graph of many steps grows."""
        given = labels if self.labelled else None

        def denoise(x: mx.array, sigma: float) -> mx.array:
            denoised, _ = self.network(x, mx.full((len(x), 1, 1, 1), sigma), given)
            mx.eval(denoised)
            return denoised

        return denoise


@dataclass(frozen=True)
class Sampler:
    """A network and its guide on their device, ready to make images."""

    port: Port
    net: Runnable
    guide: Runnable | None

    def __call__(
        self,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        guidance: float = 1.0,
        guide_interval: tuple[float, float] = (0.0, inf),
        churn_noise: Iterable[np.ndarray] | None = None,
        **steps: Any,
    ) -> np.ndarray:
        """See :meth:`Port.sample`."""
        with self.port._place():
            given = _array(labels)
            denoise = self.net.with_labels(given)
            if guidance != 1:
                if self.guide is None and given is None:
                    raise InputError(
                        "guidance without a guide drops the label, but there is none: give a guide or labels"
                    )
                guide = self.guide.with_labels(given) if self.guide is not None else self.net.with_labels(None)
                denoise = sampler.guided(denoise, guide, guidance=guidance, interval=guide_interval)
            churn = None if churn_noise is None else map(to_nhwc, churn_noise)
            return to_nchw(sampler.sample(denoise, to_nhwc(noise), churn_noise=churn, **steps))


def _steps(
    training: Training, batches: Iterable[Sequence[np.ndarray | None]], learning_rates: Sequence[float]
) -> list[float]:
    steps = zip(batches, learning_rates, strict=True)
    return [float(training.step(_batch(*batch), lr=lr)[0]) for batch, lr in steps]


def _array(array: np.ndarray | None) -> Any:
    return None if array is None else mx.array(np.ascontiguousarray(array, np.float32))


def _batch(*arrays: np.ndarray | None) -> Batch:
    images, noise, sigma, labels = arrays
    return Batch(to_nhwc(np.asarray(images)), to_nhwc(np.asarray(noise)), _array(sigma), _array(labels))


PORT = Port()
