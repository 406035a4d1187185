"""The NumPy interface of the PyTorch port. See :class:`backends.ports.Port`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends import ports
from backends.ports import Params
from edm2_core.network import NetworkConfig
from edm2_core.state import State

from .compiling import FixedSizes, Graphs, Mode, has_cpp, made_ready
from .denoiser import SamplingDenoiser
from .device import full_precision
from .network import Network, fold
from .step import Batch, Learner, batch_loss
from .weights import build, dump


@dataclass(frozen=True)
class Port(ports.Port):
    """Computes on ``device`` with activations in ``precision``. ``mode`` is that of torch.compile, None without it;
    with ``by_block``, of each block by itself; with ``graphs``, networks are sampled from by CUDA graphs."""

    name: ClassVar[str] = "torch"
    device: str = "cpu"
    precision: str = "float32"
    mode: Mode | None = None
    by_block: bool = False
    graphs: bool = False

    @property
    def compiles(self) -> bool:
        return self.mode is not None

    def native_denoise(self, network: ports.Network, /, *inputs: Any) -> Any:
        with torch.inference_mode():
            return self.network(*network)(*inputs)

    def native_gradients(self, network: ports.Network, /, *batch: Any) -> tuple[Tensor, dict[str, np.ndarray]]:
        module, arrays = self.network(*network), Batch(*batch)
        loss = batch_loss(module, arrays)
        (loss.sum() / len(arrays.images)).backward()
        return loss.detach(), dump({name: p.grad for name, p in module.named_parameters() if p.grad is not None})

    def native_jvp(self, network: ports.Network, tangent: Tensor, x: Tensor, /, *rest: Any) -> Any:
        module = self.network(*network)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no forward derivative
            return torch.func.jvp(lambda moved: module(moved, *rest)[0], (x,), (tangent,))

    def variants(self) -> "dict[str, Port]":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        devices = {name: replace(self, device=name) for name, there in available.items() if there}
        narrow = {name: replace(self, precision=name) for name in ("bfloat16", "float16")}
        compiled = {"compiled": replace(self, mode="default")} if has_cpp() else {}
        return devices | narrow | compiled

    def native_training(self, config: NetworkConfig, state: State, betas: ports.Betas, /) -> Any:
        learner = Learner(self.network(config, state.params), betas=betas, sigma_rels=tuple(state.averages))
        learner.load_state(state)
        return lambda *batch, lr: learner.step(Batch(*batch), lr=lr)[0], learner.state

    def place(self) -> AbstractContextManager[Any]:
        return full_precision()  # arrays name their device

    def denoiser(self, config: NetworkConfig, params: Params) -> SamplingDenoiser:
        network = replace(self, mode=None).network(config, params)
        fold(network)  # before it is compiled, as a network whose weights are constants
        made_ready(network, torch.device(self.device), self.mode, by_block=self.by_block)
        denoiser = SamplingDenoiser(network)
        answer = Graphs(denoiser.denoised) if self.graphs else denoiser.denoised
        fixed = self.graphs or (self.mode is not None and not self.by_block)
        return SamplingDenoiser(network, FixedSizes(answer)) if fixed else denoiser

    def to_native(self, array: np.ndarray, /) -> Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.float32, device=self.device)

    def to_numpy(self, images: Tensor, /) -> np.ndarray:
        return images.cpu().numpy()

    def network(self, config: NetworkConfig, params: Params) -> Network:
        """With these parameters, in evaluation mode."""
        network = build(config, params, device=self.device, dtype=getattr(torch, self.precision))
        made_ready(network, torch.device(self.device), self.mode, by_block=self.by_block)
        return network


PORT = Port()
