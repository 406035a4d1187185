"""The NumPy interface of the MLX port. See :class:`backends.ports.Port`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from backends import ports
from backends.ports import Params
from edm2_core.network import NetworkConfig
from edm2_core.state import State

from . import device as devices
from .denoiser import SamplingDenoiser
from .network import Network, fold
from .step import Batch, Learner, gradients_of
from .weights import build, dump, to_canonical, to_native


@dataclass(frozen=True)
class Port(ports.Port):
    """Everything is computed on ``device`` (gpu or cpu; by default the gpu where there is one), with activations in
    ``precision``.

    Raises:
        InputError: no such device here, or an unsupported precision, such as float64.
    """

    name: ClassVar[str] = "mlx"

    device: str | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        devices.choose(self.device)
        devices.arithmetic(self.precision)

    def native_denoise(self, network: ports.Network, /, *inputs: Any) -> Any:
        return self._network(*network)(*inputs)

    def native_gradients(self, network: ports.Network, /, *batch: Any) -> tuple[mx.array, dict[str, np.ndarray]]:
        arrays = Batch(*batch)
        loss, gradients = gradients_of(self._network(*network), arrays, scale=1 / len(arrays.images))
        return loss, dump(gradients)

    def native_jvp(self, network: ports.Network, tangent: mx.array, x: mx.array, /, *rest: Any) -> Any:
        module = self._network(*network)
        with mx.stream(mx.cpu):  # conv2d has no forward derivative on the GPU
            (denoised,), (derivative,) = mx.jvp(lambda moved: module(moved, *rest)[0], [x], [tangent])
            mx.eval(denoised, derivative)
        return denoised, derivative

    def variants(self) -> dict[str, "Port"]:
        on_gpu = {"gpu": replace(self, device="gpu")} if mx.is_available(mx.gpu) else {}
        return on_gpu | {name: replace(self, precision=name) for name in ("bfloat16", "float16")}

    def native_training(self, config: NetworkConfig, state: State, betas: ports.Betas, /) -> Any:
        learner = Learner(self._network(config, state.params), betas=betas, sigma_rels=tuple(state.averages))
        learner.load_state(state)
        return lambda *batch, lr: learner.step(Batch(*batch), lr=lr)[0], learner.state

    def place(self) -> AbstractContextManager[Any]:
        return mx.stream(devices.choose(self.device))

    def denoiser(self, config: NetworkConfig, params: Params) -> SamplingDenoiser:
        network = self._network(config, params)
        fold(network)
        return SamplingDenoiser(network)

    def to_native(self, array: np.ndarray, /) -> mx.array:
        return to_native(array)

    def to_numpy(self, images: mx.array, /) -> np.ndarray:
        return to_canonical(images)

    def _network(self, config: NetworkConfig, params: Params) -> Network:
        return build(config, params, dtype=devices.arithmetic(self.precision))


PORT = Port()
