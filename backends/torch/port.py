"""The adapter through which the conformance suite, and anything else that speaks NumPy, drives this port."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from os import environ
from shutil import which
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends.pipeline.checkpoints.states import State
from backends.ports import Guide, Params, Sampling
from edm2_core import sampler
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .network import Network
from .step import Batch, Training, batch_loss
from .weights import build, dump


@dataclass(frozen=True)
class Port(Sampling):
    """NumPy in, NumPy out: images NCHW, labels one-hot [N, label_dim] or None, sigma [N, 1, 1, 1], params canonical.

    All computations run on ``device`` with activations in ``precision``; ``compiles`` the network by torch.compile.
    """

    device: str = "cpu"
    precision: str = "float32"
    compiles: bool = False
    name: str = "torch"

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """denoised [N, C, H, W] and logvar [N, 1, 1, 1]. See :func:`edm2_core.reference.denoise`."""
        with torch.inference_mode():
            denoised, logvar = self.network(config, params)(self.tensor(x), self.tensor(sigma), self.tensor(labels))
        return denoised.cpu().numpy(), logvar.cpu().numpy()

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
        network = self.network(config, params)
        loss = batch_loss(network, self.batch(images, unit_noise, sigma, labels))
        (loss.sum() / len(images)).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        return loss.detach().cpu().numpy(), dump(gradients)

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
        network, level, classes = self.network(config, params), self.tensor(sigma), self.tensor(labels)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no forward derivative
            pair = torch.func.jvp(
                lambda moved: network(moved, level, classes)[0], (self.tensor(x),), (self.tensor(tangent),)
            )
        denoised, along = (array.detach().cpu().numpy() for array in pair)
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
        training = Training(self.network(config, params), betas=betas, sigma_rels=sigma_rels)
        losses = self._steps(training, batches, learning_rates)
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
        training = Training(self.network(config, state.params), sigma_rels=tuple(state.averages))
        training.load_state(state)
        return self._steps(training, batches, learning_rates), training.state()

    def _steps(
        self, training: Training, batches: Iterable[Sequence[np.ndarray | None]], learning_rates: Sequence[float]
    ) -> list[float]:
        steps = zip(batches, learning_rates, strict=True)
        return [float(training.step(self.batch(*batch), lr=lr)[0]) for batch, lr in steps]

    def variants(self) -> dict[str, "Port"]:
        """This port in other precision, compiled, and on the other devices that are here."""
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        devices = {name: replace(self, device=name) for name, there in here.items() if there}
        narrow = {name: replace(self, precision=name) for name in ("bfloat16", "float16")}
        compiled = {"compiled": replace(self, compiles=True)} if _has_a_compiler() else {}
        return devices | narrow | compiled

    def sampler(self, config: NetworkConfig, params: Params, *, guide: Guide | None = None) -> "Sampler":
        """A sampler that keeps its networks: call it for batch after batch."""
        net = self.network(config, params)
        if guide is None:
            return Sampler(self, net, None)
        guide_config, guide_params = (config, guide) if isinstance(guide, Mapping) else guide
        return Sampler(self, net, self.network(guide_config, guide_params))

    def network(self, config: NetworkConfig, params: Params) -> Network:
        network = build(config, params, device=self.device, dtype=getattr(torch, self.precision))
        if self.compiles:
            network.compile(fullgraph=True, dynamic=False)
        return network

    def tensor(self, array: np.ndarray | None) -> Any:
        return None if array is None else torch.tensor(np.asarray(array), dtype=torch.float32, device=self.device)

    def batch(self, *arrays: np.ndarray | None) -> Batch:
        return Batch(*map(self.tensor, arrays))


@dataclass(frozen=True)
class Sampler:
    """A network and its guide on their device, ready to make images."""

    port: Port
    net: Network
    guide: Network | None

    @torch.inference_mode()
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
        given = self.port.tensor(labels)
        denoise = denoiser(self.net, given)
        if guidance != 1:
            if self.guide is None and given is None:
                raise InputError("guidance without a guide drops the label, but there is none: give a guide or labels")
            guide = denoiser(self.guide, given) if self.guide is not None else denoiser(self.net, None)
            denoise = sampler.guided(denoise, guide, guidance=guidance, interval=guide_interval)
        churn = None if churn_noise is None else map(self.port.tensor, churn_noise)
        return sampler.sample(denoise, self.port.tensor(noise), churn_noise=churn, **steps).cpu().numpy()


def _has_a_compiler() -> bool:
    """torch.compile writes C++ for a CPU."""
    return any(map(which, (environ.get("CXX", "g++"), "clang++", "cl")))


def denoiser(network: Network, labels: Tensor | None) -> sampler.Denoiser:
    """``network`` as the sampler wants it; an unconditional one does without the labels."""
    labels = labels if network.config.label_dim else None
    return lambda x, sigma: network(x, x.new_full((len(x), 1, 1, 1), sigma), labels)[0]


PORT = Port()
