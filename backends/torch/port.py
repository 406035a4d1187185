"""The NumPy face of the PyTorch port. See :class:`backends.ports.Port`."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import environ
from shutil import which
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends import ports
from backends.ports import Params
from edm2_core.network import NetworkConfig
from edm2_core.state import State

from .denoiser import SamplingDenoiser
from .network import Network
from .step import Batch, Learner, batch_loss
from .weights import build, dump


@dataclass(frozen=True)
class Port(ports.Port):
    """Computes on ``device`` with activations in ``precision``; ``compiles`` the network by torch.compile."""

    name: ClassVar[str] = "torch"
    device: str = "cpu"
    precision: str = "float32"
    compiles: bool = False

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            denoised, logvar = self.network(config, params)(*self.batch(x, sigma, labels))
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
        network = self.network(config, params)
        loss = batch_loss(network, Batch(*self.batch(images, unit_noise, sigma, labels)))
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
        network, (noisy, level, one_hot, direction) = (
            self.network(config, params),
            self.batch(x, sigma, labels, tangent),
        )
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no forward derivative
            pair = torch.func.jvp(lambda moved: network(moved, level, one_hot)[0], (noisy,), (direction,))
        denoised, along = (array.detach().cpu().numpy() for array in pair)
        return denoised, along

    def variants(self) -> "dict[str, Port]":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        devices = {name: replace(self, device=name) for name, there in available.items() if there}
        narrow = {name: replace(self, precision=name) for name in ("bfloat16", "float16")}
        compiled = {"compiled": replace(self, compiles=True)} if _has_a_compiler() else {}
        return devices | narrow | compiled

    def steps(
        self,
        config: NetworkConfig,
        state: State,
        batches: Iterable[ports.Batch],
        *,
        learning_rates: Sequence[float],
        betas: tuple[float, float],
    ) -> tuple[list[float], State]:
        learner = Learner(self.network(config, state.params), betas=betas, sigma_rels=tuple(state.averages))
        learner.load_state(state)
        pairs = zip(batches, learning_rates, strict=True)
        losses = [float(learner.step(Batch(*self.batch(*batch)), lr=lr)[0]) for batch, lr in pairs]
        return losses, learner.state()

    def place(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def denoiser(self, config: NetworkConfig, params: Params) -> SamplingDenoiser:
        return SamplingDenoiser(self.network(config, params))

    def to_native(self, array: np.ndarray, /) -> Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.float32, device=self.device)

    def to_numpy(self, images: Tensor, /) -> np.ndarray:
        return images.cpu().numpy()

    def network(self, config: NetworkConfig, params: Params) -> Network:
        """With these parameters, in evaluation mode."""
        network = build(config, params, device=self.device, dtype=getattr(torch, self.precision))
        if self.compiles:
            network.compile(fullgraph=True, dynamic=False)
        return network

    def batch(self, *arrays: np.ndarray | None) -> list[Any]:
        """Native arrays; None stays None."""
        return [None if array is None else self.to_native(array) for array in arrays]


def _has_a_compiler() -> bool:
    """torch.compile writes C++ for a CPU."""
    return any(map(which, (environ.get("CXX", "g++"), "clang++", "cl")))


PORT = Port()
