"""The adapter through which the conformance suite, and anything else that speaks NumPy, drives this port."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backends.pipeline.checkpoints.states import State
from backends.ports import Guide, Params, Sampling
from edm2_core import sampler
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from . import weights
from .network import denoise
from .step import Batch, batch_loss, from_stored, init, make_step, to_stored
from .step import State as Moving
from .weights import to_nchw, to_nhwc


@dataclass(frozen=True)
class Port(Sampling):
    """NumPy in, NumPy out: images NCHW, labels one-hot [N, label_dim] or None, sigma [N, 1, 1, 1], params canonical.

    All computations run on ``device`` (None: JAX's own choice), with activations in ``precision`` and matrix products
    in ``matmul``: 'highest' is float32 everywhere, None whatever is fastest. It ``compiles`` whole functions, which
    takes seconds for each new network and shape, or runs them operation by operation.
    """

    device: Any = None
    precision: str = "float32"
    matmul: str | None = "highest"
    compiles: bool = True
    name: str = "jax"

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """denoised [N, C, H, W] and logvar [N, 1, 1, 1]. See :func:`edm2_core.reference.denoise`."""
        with self._place():
            found = _denoiser(config, self.precision)(
                weights.load(config, params), to_nhwc(x), _array(sigma), _array(labels)
            )
        return to_nchw(found[0]), np.asarray(found[1])

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
            state = init(config, params, sigma_rels=(0.05,))
            batch = self._batch(images, unit_noise, sigma, labels)
            gradients, loss = _gradients(config, self.precision)(state.params, state.constants, batch)
        return to_nchw(loss), weights.dump(gradients)

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
        with self._place():
            native, moved, along = weights.load(config, params), _pixels(x), _pixels(tangent)
            pair = _derivative(config, self.precision)(native, moved, along, _array(sigma), _array(labels))
        denoised, found = map(to_nchw, pair)
        return denoised, found

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
            start = init(config, params, sigma_rels=sigma_rels)
            losses, stored = self._steps(config, start, batches, learning_rates, betas)
        return losses, stored.params, stored.averages

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
            return self._steps(config, from_stored(config, state), batches, learning_rates, (0.9, 0.99))

    def _steps(
        self,
        config: NetworkConfig,
        state: Moving,
        batches: Iterable[Sequence[np.ndarray | None]],
        learning_rates: Sequence[float],
        betas: tuple[float, float],
    ) -> tuple[list[float], State]:
        step, losses = _step(config, self.precision, betas), []
        for batch, lr in zip(batches, learning_rates, strict=True):
            state, metrics = step(state, self._batch(*batch), jnp.float32(lr), jax.random.key(0))
            losses.append(float(metrics.loss))
        return losses, to_stored(state)

    def variants(self) -> dict[str, "Port"]:
        """This port in other precision, not compiled, and on the other devices that are here."""
        others = {device.platform: device for device in jax.devices() if device.platform != "cpu"}
        devices = {name: replace(self, device=device) for name, device in others.items()}
        narrow = {name: replace(self, precision=name) for name in ("bfloat16", "float16")}
        return devices | narrow | {"not compiled": replace(self, compiles=False)}

    def sampler(self, config: NetworkConfig, params: Params, *, guide: Guide | None = None) -> "Sampler":
        """A sampler that keeps its networks: call it for batch after batch."""
        with self._place():
            net = (config, weights.load(config, params))
            if guide is None:
                return Sampler(self, net, None)
            guide_config, guide_params = (config, guide) if isinstance(guide, Mapping) else guide
            return Sampler(self, net, (guide_config, weights.load(guide_config, guide_params)))

    def _batch(self, *arrays: np.ndarray | None) -> Batch:
        images, noise, sigma, labels = arrays
        return Batch(_pixels(images), _pixels(noise), _array(sigma), _array(labels))

    def _place(self) -> Any:
        return _Place(self)


@dataclass(frozen=True)
class Sampler:
    """A network and its guide on their device, ready to make images. One compilation per shape, whatever the steps."""

    port: Port
    net: tuple[NetworkConfig, dict[str, Array]]
    guide: tuple[NetworkConfig, dict[str, Array]] | None

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
            run = self._denoiser(self.net, given)
            if guidance != 1:
                if self.guide is None and given is None:
                    raise InputError(
                        "guidance without a guide drops the label, but there is none: give a guide or labels"
                    )
                guide = self._denoiser(self.guide or self.net, given if self.guide is not None else None)
                run = sampler.guided(run, guide, guidance=guidance, interval=guide_interval)
            churn = None if churn_noise is None else (jnp.asarray(to_nhwc(array)) for array in churn_noise)
            return to_nchw(sampler.sample(run, jnp.asarray(to_nhwc(noise)), churn_noise=churn, **steps))

    def _denoiser(self, network: tuple[NetworkConfig, dict[str, Array]], labels: Array | None) -> sampler.Denoiser:
        config, params = network
        compiled = _denoiser(config, self.port.precision)
        labels = labels if config.label_dim else None
        return lambda x, sigma: compiled(params, x, jnp.full((len(x), 1, 1, 1), sigma, jnp.float32), labels)[0]


class _Place:
    """Where, how exactly and how is computed inside a ``with``. JAX's own settings are as before afterwards."""

    def __init__(self, port: Port) -> None:
        self._entered = (
            jax.default_device(port.device),
            jax.default_matmul_precision(port.matmul),
            jax.disable_jit(not port.compiles),
        )

    def __enter__(self) -> None:
        for context in self._entered:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self._entered):
            context.__exit__(*error)


@lru_cache(maxsize=64)
def _denoiser(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    dtype = getattr(jnp, precision)
    return jax.jit(lambda params, x, sigma, labels: denoise(config, params, x, sigma, labels, dtype=dtype))


@lru_cache(maxsize=64)
def _derivative(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    dtype = getattr(jnp, precision)

    def along(params: Any, x: Array, tangent: Array, sigma: Array, labels: Array | None) -> tuple[Array, Array]:
        return jax.jvp(lambda moved: denoise(config, params, moved, sigma, labels, dtype=dtype)[0], (x,), (tangent,))

    return jax.jit(along)


@lru_cache(maxsize=64)
def _gradients(config: NetworkConfig, precision: str) -> Callable[..., Any]:
    dtype = getattr(jnp, precision)

    def scalar(params: Any, constants: Any, batch: Batch) -> tuple[Array, Array]:
        loss = batch_loss(config, {**params, **constants}, batch, dtype=dtype)
        return loss.sum() / len(batch.images), loss

    return jax.jit(jax.grad(scalar, has_aux=True))


@lru_cache(maxsize=64)
def _step(config: NetworkConfig, precision: str, betas: tuple[float, float]) -> Callable[..., Any]:
    return jax.jit(make_step(config, betas=betas, dtype=getattr(jnp, precision)), donate_argnums=0)


def _array(array: np.ndarray | None) -> Any:
    return None if array is None else jnp.asarray(np.asarray(array, np.float32))


def _pixels(images: np.ndarray | None) -> Array:
    return jnp.asarray(to_nhwc(np.asarray(images)))


PORT = Port()
