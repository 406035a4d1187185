"""The NumPy interface of the JAX port. See :class:`backends.ports.Port`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backends import ports
from backends.ports import Params
from edm2_core.ema import Length
from edm2_core.network import NetworkConfig
from edm2_core.state import State

from . import attention, trajectory, weights
from .denoiser import SamplingDenoiser
from .device import SAMPLING_MATMUL
from .network import folded, load_network, network_denoiser
from .step import Batch, TrainState, batch_loss, from_state, make_network_step, to_state
from .weights import to_nchw, to_nhwc


@dataclass(frozen=True)
class Port(ports.Port):
    """The JAX port on ``device`` (None: JAX's default), with activations in ``precision``.

    Matrix products are in ``matmul``: 'highest' is float32, None JAX's default. It ``compiles`` whole functions, which
    takes seconds for each new network and shape, or runs them operation by operation.
    """

    name: ClassVar[str] = "jax"

    device: Any = None
    precision: str = "float32"
    matmul: str | None = SAMPLING_MATMUL
    compiles: bool = True

    def native_denoise(self, network: ports.Network, /, *inputs: Any) -> Any:
        config, params = network
        return _denoise(config, self.precision)(weights.load(config, params), *inputs)

    def native_gradients(self, network: ports.Network, /, *batch: Any) -> tuple[Array, dict[str, np.ndarray]]:
        trained, constants = weights.load_divided(*network)
        gradients, loss = _gradients(network[0], self.precision)(trained, constants, Batch(*batch))
        return loss, weights.dump(gradients)

    def native_jvp(self, network: ports.Network, tangent: Array, x: Array, /, *rest: Any) -> Any:
        config, params = network
        return _derivative(config, self.precision)(weights.load(config, params), tangent, x, *rest)

    def native_training(self, config: NetworkConfig, state: State, betas: ports.Betas, /) -> Any:
        step, current = _step(config, self.precision, betas, tuple(state.averages)), [from_state(config, state)]

        def take(*batch: Any, lr: float) -> Array:
            current[0], metrics = step(current[0], Batch(*batch), lr=jnp.float32(lr))
            loss: Array = metrics.loss
            return loss

        return take, lambda: to_state(current[0])

    def variants(self) -> dict[str, ports.Port]:
        others = {device.platform: device for device in jax.devices() if device.platform != "cpu"}
        devices = {name: replace(self, device=device) for name, device in others.items()}
        narrow = {name: replace(self, precision=name) for name in ("bfloat16", "float16")}
        return {**devices, **narrow, "not compiled": replace(self, compiles=False)}

    @contextmanager
    def place(self) -> Iterator[None]:
        with ExitStack() as settings:
            settings.enter_context(jax.default_device(self.device))
            settings.enter_context(jax.default_matmul_precision(self.matmul))
            settings.enter_context(jax.disable_jit(not self.compiles))
            yield

    def denoiser(self, config: NetworkConfig, params: Params) -> SamplingDenoiser:
        attend = attention.fastest(self.device or jax.devices()[0])
        network = load_network(config, params, dtype=self.precision, attend=attend)
        return SamplingDenoiser(replace(network, params=folded(config, network.params, dtype=self.precision)))

    def native_sample(self, net: SamplingDenoiser, noise: Array, labels: Array | None, /, **options: Any) -> Array:
        return trajectory.sample(net, noise, labels, **options)

    def to_native(self, array: np.ndarray, /) -> Array:
        return jnp.asarray(to_nhwc(array) if array.ndim == 4 else array, jnp.float32)

    def to_numpy(self, images: Array, /) -> np.ndarray:
        return to_nchw(images)


@lru_cache(maxsize=64)
def _denoise(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    return jax.jit(network_denoiser(config, precision))


@lru_cache(maxsize=64)
def _derivative(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    denoise = network_denoiser(config, precision)

    def along(params: Any, tangent: Array, x: Array, *rest: Any) -> tuple[Array, Array]:
        return jax.jvp(lambda moved: denoise(params, moved, *rest)[0], (x,), (tangent,))

    return jax.jit(along)


@lru_cache(maxsize=64)
def _gradients(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    denoise = network_denoiser(config, precision)

    def scalar(params: Any, constants: Any, batch: Batch) -> tuple[Array, Array]:
        loss = batch_loss(denoise, {**params, **constants}, batch, sigma_data=config.sigma_data)
        return loss.sum() / len(batch.images), loss

    return jax.jit(jax.grad(scalar, has_aux=True))


@lru_cache(maxsize=64)
def _step(
    config: NetworkConfig, precision: str, betas: tuple[float, float], lengths: tuple[Length, ...]
) -> Callable[..., tuple[TrainState, Any]]:
    return jax.jit(make_network_step(config, sigma_rels=lengths, betas=betas, dtype=precision), donate_argnums=0)


PORT = Port()
