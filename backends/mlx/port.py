"""The NumPy face of the MLX port. See :class:`backends.ports.Port`."""

from collections.abc import Iterable, Sequence
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
from .network import Network
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

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        with self.place():
            denoised, logvar = self._network(config, params)(*_batch(x, sigma, labels))
            return to_canonical(denoised), to_canonical(logvar)

    def loss_and_gradients(
        self,
        config: NetworkConfig,
        params: Params,
        images: np.ndarray,
        unit_noise: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        with self.place():
            network, batch = self._network(config, params), Batch(*_batch(images, unit_noise, sigma, labels))
            loss, gradients = gradients_of(network, batch, scale=1 / len(images))
            return to_canonical(loss), dump(gradients)

    def jvp(
        self,
        config: NetworkConfig,
        params: Params,
        x: np.ndarray,
        sigma: np.ndarray,
        labels: np.ndarray | None,
        tangent: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        with self.place(), mx.stream(mx.cpu):  # conv2d has no forward derivative on the GPU
            network, (level, one_hot) = self._network(config, params), _batch(sigma, labels)
            primals, tangents = [to_native(x)], [to_native(tangent)]
            (denoised,), (derivative,) = mx.jvp(lambda x: network(x, level, one_hot)[0], primals, tangents)
            return to_canonical(denoised), to_canonical(derivative)

    def variants(self) -> dict[str, "Port"]:
        on_gpu = {"gpu": replace(self, device="gpu")} if mx.is_available(mx.gpu) else {}
        return on_gpu | {name: replace(self, precision=name) for name in ("bfloat16", "float16")}

    def steps(
        self,
        config: NetworkConfig,
        state: State,
        batches: Iterable[ports.Batch],
        *,
        learning_rates: Sequence[float],
        betas: tuple[float, float],
    ) -> tuple[list[float], State]:
        with self.place():
            learner = Learner(self._network(config, state.params), betas=betas, sigma_rels=tuple(state.averages))
            learner.load_state(state)
            steps = zip(batches, learning_rates, strict=True)
            losses = [learner.step(Batch(*_batch(*batch)), lr=lr)[0] for batch, lr in steps]
            return [float(np.array(loss)) for loss in losses], learner.state()

    def place(self) -> AbstractContextManager[Any]:
        return mx.stream(devices.choose(self.device))

    def denoiser(self, config: NetworkConfig, params: Params) -> SamplingDenoiser:
        return SamplingDenoiser(self._network(config, params))

    def to_native(self, array: np.ndarray, /) -> mx.array:
        return to_native(array)

    def to_numpy(self, images: mx.array, /) -> np.ndarray:
        return to_canonical(images)

    def _network(self, config: NetworkConfig, params: Params) -> Network:
        return build(config, params, dtype=devices.arithmetic(self.precision))


def _batch(*arrays: np.ndarray | None) -> list[Any]:
    return [None if array is None else to_native(np.asarray(array)) for array in arrays]


PORT = Port()
