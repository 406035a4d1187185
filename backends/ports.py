"""Base classes and protocols of a port, and the code that all ports share: guidance and sampling.

A port in ``backends/NAME`` subclasses :class:`Port` and :class:`~backends.trainer.Trainer` and adds the network, the
training step and the devices of its framework. This module imports no framework.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from edm2_core import sampler
from edm2_core.arrays import namespace
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, plan
from edm2_core.state import State

Params = Mapping[str, np.ndarray]  # canonical: float32 arrays by name
Network = tuple[NetworkConfig, Params]
Betas = tuple[float, float]
Batch = Sequence[np.ndarray | None]
"""images and unit_noise [N, C, H, W], sigma [N, 1, 1, 1], labels [N, label_dim] or None, and, for a network that takes
one, a condition [N, cond_channels, H, W]; float32."""


Compile = Literal["auto", "off", "max", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device, and how many images it processes at once. It affects only the rounding of the result."""

    device: str | None = None
    """Device to compute on. Without it: the fastest available."""
    batch_per_device: int | None = None
    """Images per device at a time; gradients of a larger share of the batch are accumulated. Without it: all."""
    workers: int = 0
    """Processes that read and decode the data; 0: threads. Give 2 or more where images are decoded for a GPU."""
    compile: Compile = "auto"
    """Compilation of PyTorch's network: auto on GPUs; max also searches for the fastest kernels, which takes minutes;
    blocks compiles each kind of block once, on any device, and starts soonest; off. JAX and MLX always compile."""
    shard: bool = False
    """Divide weights, moments and averages among the processes: large networks fit, and more is sent. JAX divides them
    always, MLX cannot."""
    timeout: float | None = None
    """Seconds that processes wait for each other, and for data, before they end with an error. Without it:
    EDM2_TIMEOUT, or 300."""
    activation_checkpoint: bool = False
    """Compute the activations of each block anew in the backward pass: less memory, a third more time."""


# ---- sampling


class LabelledDenoiser(Protocol):
    """A network of one framework, as sampling calls it: ``(x, sigma, labels, condition) -> denoised``, sigma a float.

    ``label_dim`` and ``cond_channels`` are 0 for a network without labels or condition, which is then called with None.
    """

    @property
    def label_dim(self) -> int: ...
    @property
    def cond_channels(self) -> int: ...

    def __call__(self, x: Any, sigma: float, labels: Any, condition: Any = None, /) -> Any: ...


def sample(
    net: LabelledDenoiser,
    noise: Any,
    labels: Any = None,
    /,
    *,
    condition: Any = None,
    guide: LabelledDenoiser | None = None,
    guidance: float = 1.0,
    guide_interval: tuple[float, float] = (0.0, inf),
    joint: bool = False,
    **solver: Any,
) -> Any:
    """Sample on native arrays: :func:`edm2_core.sampler.sample` of a network with labels and a guide.

    Shapes: noise [N, ...]; labels one-hot [N, label_dim], or None; condition like noise but for its channels, or None;
    returns an array like noise. A ``guide`` of None is ``net`` without its label; guidance and interval are those of
    :func:`edm2_core.sampler.guided`. A guide that takes a condition gets the same. ``joint``: ``net`` answers with and
    without its label in one call, of twice the batch, in which rows of zeros stand for no label.

    Raises:
        InputError: labels that are not one-hot rows; a condition that is missing, not taken, or for other images;
            guidance without a guide or labels; or as the sampler.
    """
    check_sampling(net, noise, labels, condition=condition, guide=guide, guidance=guidance)
    denoise = bound(net, labels, condition)
    if guidance != 1:
        if joint and guide is None:
            denoise = _guided_by_itself(denoise, bound_twice(net, labels, condition), guidance, guide_interval)
        else:
            guiding = bound(net, None, condition) if guide is None else bound(guide, labels, condition)
            denoise = sampler.guided(denoise, guiding, guidance=guidance, interval=guide_interval)
    return sampler.sample(denoise, noise, **solver)


def check_sampling(
    net: LabelledDenoiser,
    noise: Any,
    labels: Any,
    /,
    *,
    condition: Any,
    guide: LabelledDenoiser | None,
    guidance: float,
) -> None:
    """Raise InputError unless these arguments of :func:`sample` fit together."""
    if labels is not None and net.label_dim and (need := (len(noise), net.label_dim)) != tuple(labels.shape):
        raise InputError(f"labels must be one-hot rows of shape {need}, got {tuple(labels.shape)}: make them one-hot")
    takes = any(network.cond_channels for network in (net, guide) if network is not None)
    if takes != (condition is not None) or (condition is not None and len(condition) != len(noise)):
        shown = "None" if condition is None else f"one of shape {tuple(condition.shape)}"
        wanted = f"a condition for each of {len(noise)} images" if takes else "no condition"
        raise InputError(f"this network must be sampled with {wanted}, got {shown}")
    if guidance != 1 and guide is None and (labels is None or not net.label_dim):
        got = "None" if labels is None else "a network that takes none"
        raise InputError(f"guidance without a guide needs labels, got {got}: give a guide or labels")


def bound(network: LabelledDenoiser, labels: Any, condition: Any, /) -> sampler.Denoiser[Any]:
    """``network`` with these labels and condition, as the sampler takes it."""
    given = labels if network.label_dim else None, condition if network.cond_channels else None
    return lambda x, sigma: network(x, sigma, *given)


def bound_twice(net: LabelledDenoiser, labels: Any, condition: Any, /) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The answers of ``net`` with its labels and without them, in one call of twice the batch."""
    xp: Any = namespace(labels)
    rows = xp.concat([labels, xp.zeros_like(labels)])
    twice = None if condition is None else xp.concat([condition, condition])

    def both(x: Any, sigma: Any) -> tuple[Any, Any]:
        answers = net(xp.concat([x, x]), sigma, rows, twice)
        return answers[: len(x)], answers[len(x) :]

    return both


def _guided_by_itself(
    alone: sampler.Denoiser[Any],
    both: Callable[[Any, Any], tuple[Any, Any]],
    guidance: float,
    interval: tuple[float, float],
    /,
) -> sampler.Denoiser[Any]:
    """:func:`edm2_core.sampler.guided` of a network by itself without its label, in one call of the network."""

    def denoise(x: Any, sigma: float) -> Any:
        if not interval[0] <= sigma <= interval[1]:
            return alone(x, sigma)
        with_label, without = both(x, sigma)
        return without + guidance * (with_label - without)

    return denoise


class Sampler(Protocol):
    """Float32 noise [N, C, H, W] and labels [N, label_dim] or None to float32 images [N, C, H, W], all NumPy.

    ``options`` are those of :func:`sample`, with a ``condition`` [N, cond_channels, H, W].
    """

    def __call__(self, noise: np.ndarray, labels: np.ndarray | None = None, **options: Any) -> np.ndarray: ...


class OpenSampler(Protocol):
    """Makes a sampler of a network, and of its guide, on their device. See :meth:`Port.sampler`."""

    def __call__(self, config: NetworkConfig, params: Params, *, guide: Network | None = None) -> Sampler: ...


# ---- the NumPy interface of a port


class Port(ABC):
    """The NumPy interface of a port, used by the conformance suite and the commands.

    Images are NCHW, labels [N, label_dim] or None, sigma [N, 1, 1, 1], a condition [N, cond_channels, H, W] or None,
    parameters canonical; arguments and results are float32 NumPy arrays. A concrete port defines the abstract methods;
    the others are built on them.
    """

    name: ClassVar[str]

    def denoise(
        self,
        config: NetworkConfig,
        params: Params,
        x: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None = None,
        condition: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns denoised [N, C, H, W] and logvar [N, 1, 1, 1]. See :func:`edm2_core.reference.denoise`."""
        with self.place():
            denoised, logvar = self.native_denoise((config, params), *self.batch(x, sigma, labels, condition))
            return self.to_numpy(denoised), self.to_numpy(logvar)

    def loss_and_gradients(
        self,
        config: NetworkConfig,
        params: Params,
        images: np.ndarray,
        unit_noise: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None = None,
        condition: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The loss of each element [N, C, H, W]; and by name the gradients of loss.sum() / N with respect to the stored
        weights, without forcing them first."""
        with self.place():
            batch = self.batch(images, unit_noise, sigma, labels, condition)
            loss, gradients = self.native_gradients((config, params), *batch)
            return self.to_numpy(loss), gradients

    def jvp(
        self,
        config: NetworkConfig,
        params: Params,
        x: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None,
        tangent: np.ndarray,
        condition: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The denoised images, and their derivative along ``tangent``, both [N, C, H, W]."""
        with self.place():
            inputs = self.batch(tangent, x, sigma, labels, condition)
            denoised, derivative = self.native_jvp((config, params), *inputs)
            return self.to_numpy(denoised), self.to_numpy(derivative)

    def batch(self, *arrays: np.ndarray | None) -> list[Any]:
        """Native arrays; None stays None."""
        return [None if array is None else self.to_native(np.asarray(array)) for array in arrays]

    @abstractmethod
    def variants(self) -> Mapping[str, "Port"]:
        """This port, by a name, in other precisions, compiled or not, and on the other devices of this machine."""

    @abstractmethod
    def place(self) -> AbstractContextManager[Any]:
        """Context manager in which the framework computes on this port's device and with its settings."""

    @abstractmethod
    def to_native(self, array: np.ndarray, /) -> Any:
        """Images [N, C, H, W], sigma [N, 1, 1, 1] or one-hot labels [N, label_dim] to the network's layout."""

    @abstractmethod
    def to_numpy(self, images: Any, /) -> np.ndarray:
        """Native images, or an array [N, 1, 1, 1], to float32 NumPy, images to [N, C, H, W]."""

    @abstractmethod
    def denoiser(self, config: NetworkConfig, params: Params) -> LabelledDenoiser:
        """A network with these parameters on this port's device, to be called on native arrays."""

    @abstractmethod
    def native_denoise(self, network: Network, /, *inputs: Any) -> tuple[Any, Any]:
        """:meth:`denoise` of native x, sigma, labels and condition."""

    @abstractmethod
    def native_gradients(self, network: Network, /, *batch: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """:meth:`loss_and_gradients` of native arrays: the native loss, and canonical gradients."""

    @abstractmethod
    def native_jvp(self, network: Network, tangent: Any, x: Any, /, *rest: Any) -> tuple[Any, Any]:
        """:meth:`jvp` of native arrays: the tangent, then the inputs of :meth:`native_denoise`."""

    @abstractmethod
    def native_training(
        self, config: NetworkConfig, state: State, betas: Betas, /
    ) -> tuple[Callable[..., Any], Callable[[], State]]:
        """Training from ``state`` on: ``step(*native batch, lr=)``, which returns the mean loss, and the state now."""

    def native_sample(self, net: Any, noise: Any, labels: Any, /, **options: Any) -> Any:
        """:func:`sample`, of networks that :meth:`denoiser` made."""
        return sample(net, noise, labels, **options)

    def train(
        self,
        config: NetworkConfig,
        params: Params,
        batches: Iterable[Batch],
        *,
        learning_rates: Sequence[float],
        betas: Betas = (0.9, 0.99),
        sigma_rels: Sequence[float] = (0.05, 0.10),
    ) -> tuple[list[float], Params, dict[float, Params]]:
        """Train from ``params``, one step per batch. Returns mean losses, parameters, and averages by sigma_rel."""
        trained = [name for name, parameter in plan(config).parameters.items() if parameter.trained]
        start = State.start(params, trained=trained, lengths=map(Length.of, sigma_rels))
        losses, end = self._steps(config, start, batches, learning_rates, betas)
        return losses, end.params, {length.value: average for length, average in end.averages.items()}

    def advance(
        self, config: NetworkConfig, state: State, batches: Iterable[Batch], *, learning_rates: Sequence[float]
    ) -> tuple[list[float], State]:
        """One step per batch from ``state`` on, betas (0.9, 0.99): mean losses, and the state afterwards."""
        return self._steps(config, state, batches, learning_rates, (0.9, 0.99))

    def _steps(
        self, config: NetworkConfig, state: State, batches: Iterable[Batch], rates: Sequence[float], betas: Betas
    ) -> tuple[list[float], State]:
        with self.place():
            step, state_now = self.native_training(config, state, betas)
            losses = [step(*self.batch(*batch), lr=lr) for batch, lr in zip(batches, rates, strict=True)]
            return [float(loss) for loss in losses], state_now()

    def sampler(self, config: NetworkConfig, params: Params, *, guide: Params | Network | None = None) -> Sampler:
        """A sampler that keeps its networks on the device, to be called for each batch.

        ``guide``: parameters of a network of the same config, or (config, parameters) of another; None: guidance uses
        the network itself without its label.
        """
        with self.place():
            net = self.denoiser(config, params)
            if guide is None:
                return NetworkSampler(self, net, None)
            guide_network = (config, guide) if isinstance(guide, Mapping) else guide
            return NetworkSampler(self, net, self.denoiser(*guide_network))

    def sample(
        self,
        config: NetworkConfig,
        params: Params,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        guide: Params | Network | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Images [N, C, H, W] from ``noise``. ``guide`` as in :meth:`sampler`; ``options`` as in :func:`sample`, with
        NumPy arrays."""
        return self.sampler(config, params, guide=guide)(noise, labels, **options)


@dataclass(frozen=True)
class NetworkSampler:
    """A :class:`Sampler` of a port: a network and its guide on their device."""

    port: Port
    net: LabelledDenoiser
    guide: LabelledDenoiser | None

    def __call__(
        self,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        condition: np.ndarray | None = None,
        churn_noise: Iterable[np.ndarray] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """See :class:`Sampler`; ``churn_noise`` is an iterator over NumPy arrays [N, C, H, W]."""
        with self.port.place():
            start, rows, image = self.port.batch(noise, labels, condition)
            options |= {} if churn_noise is None else {"churn_noise": map(self.port.to_native, churn_noise)}
            samples = self.port.native_sample(
                self.net, start, rows, condition=image, guide=self.guide, joint=True, **options
            )
            return self.port.to_numpy(samples)
