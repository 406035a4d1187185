"""Members that in-house ports do not have themselves yet, on top of their public modules; looked up by PORT.name."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

Extras = dict[str, Callable[..., Any]]
HALVES = ("bfloat16", "float16")


def of(port: Any) -> Extras:
    """The companions of ``port``, if its class is in-house: its framework is imported already."""
    root, _, rest = type(port).__module__.partition(".")
    makers = {"torch.port": _torch, "jax.port": _jax, "mlx.port": _mlx}
    return makers[rest](port) if root == "backends" and rest in makers else {}


def _halves(port: Any) -> dict[str, Any]:
    return {precision: replace(port, precision=precision) for precision in HALVES}


def _torch(port: Any) -> Extras:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from backends.torch.step import Training
    from backends.torch.weights import build

    def jvp(config: Any, params: Any, x: Any, sigma: Any, labels: Any, tangent: Any) -> Any:
        network, s, c = port.network(config, params), port.tensor(sigma), port.tensor(labels)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no forward derivative
            pair = torch.func.jvp(lambda moved: network(moved, s, c)[0], (port.tensor(x),), (port.tensor(tangent),))
        return tuple(array.detach().cpu().numpy() for array in pair)

    def advance(config: Any, state: Any, batches: Sequence[Any], *, learning_rates: Sequence[float]) -> Any:
        training = Training(build(config, state.params), sigma_rels=tuple(state.averages))
        training.load_state(state)
        steps = zip(batches, learning_rates, strict=True)
        losses = [float(training.step(port.batch(*batch), lr=lr)[0]) for batch, lr in steps]
        return losses, training.state()

    def variants() -> dict[str, Any]:
        devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return _halves(port) | {name: replace(port, device=name) for name, here in devices.items() if here}

    return {"jvp": jvp, "advance": advance, "variants": variants}


def _jax(port: Any) -> Extras:
    import jax
    import jax.numpy as jnp

    from backends.jax import step as steps
    from backends.jax import weights
    from backends.jax.network import denoise

    @jax.jit
    def derivative(run: Any, native: Any, x: Any, tangent: Any, sigma: Any, labels: Any) -> Any:
        return jax.jvp(lambda moved: run(native, moved, sigma, labels), (x,), (tangent,))

    def jvp(config: Any, params: Any, x: Any, sigma: Any, labels: Any, tangent: Any) -> Any:
        def run(native: Any, moved: Any, sigma: Any, labels: Any) -> Any:
            return denoise(config, native, moved, sigma, labels)[0]

        with jax.default_matmul_precision("highest"):
            native, moved, along = weights.load(config, params), weights.to_nhwc(x), weights.to_nhwc(tangent)
            pair = derivative(jax.tree_util.Partial(run), native, moved, along, sigma, labels)
        return tuple(map(weights.to_nchw, pair))

    def advance(config: Any, state: Any, batches: Sequence[Any], *, learning_rates: Sequence[float]) -> Any:
        with jax.default_matmul_precision("highest"):
            moving, losses = steps.from_stored(config, state), []
            step = compiled(config)
            for batch, lr in zip(batches, learning_rates, strict=True):
                images, noise, sigma, labels = batch
                native: Any = (weights.to_nhwc(images), weights.to_nhwc(noise), sigma, labels)
                moving, metrics = step(moving, steps.Batch(*native), jnp.float32(lr), jax.random.key(0))
                losses.append(float(metrics.loss))
            return losses, steps.to_stored(moving)

    kept: dict[Any, Any] = {}

    def compiled(config: Any) -> Any:
        return kept.setdefault(config, jax.jit(steps.make_step(config)))

    def variants() -> dict[str, Any]:
        others = {device.platform: device for device in jax.devices() if device.platform != "cpu"}
        return _halves(port) | {name: replace(port, device=device) for name, device in others.items()}

    return {"jvp": jvp, "advance": advance, "variants": variants, "compiles": lambda: True}


def _mlx(port: Any) -> Extras:
    import mlx.core as mx

    from backends.mlx.step import Batch, Training
    from backends.mlx.weights import build, to_nchw, to_nhwc

    def array(values: Any) -> Any:
        return None if values is None else mx.array(values)

    def jvp(config: Any, params: Any, x: Any, sigma: Any, labels: Any, tangent: Any) -> Any:
        network, s, c = build(config, params), array(sigma), array(labels)
        out, along = mx.jvp(lambda moved: network(moved, s, c)[0], [to_nhwc(x)], [to_nhwc(tangent)])
        return to_nchw(out[0]), to_nchw(along[0])

    def advance(config: Any, state: Any, batches: Sequence[Any], *, learning_rates: Sequence[float]) -> Any:
        training = Training(build(config, state.params), sigma_rels=tuple(state.averages))
        training.load_state(state)
        steps = zip(batches, learning_rates, strict=True)
        losses = [training.step(native(*batch), lr=lr)[0].item() for batch, lr in steps]
        return losses, training.state()

    def variants() -> dict[str, Any]:
        return _halves(port) | ({"gpu": replace(port, device="gpu")} if mx.metal.is_available() else {})

    def native(images: Any, noise: Any, sigma: Any, labels: Any) -> Any:
        return Batch(to_nhwc(images), to_nhwc(noise), array(sigma), array(labels))

    return {"jvp": jvp, "advance": advance, "variants": variants}
