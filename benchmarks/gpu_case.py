"""One network in one port, for :mod:`benchmarks.gpu`: compiles, says that it is ready, waits for a line, and times.

On stdout: a line when it is ready, then the rows, each as JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
import torch
import tyro

from backends.torch import device as devices
from backends.torch.compiling import compile_mode
from benchmarks import torch_cases as cases
from benchmarks.networks import BENCH_32
from benchmarks.rounds import Row, in_turns
from benchmarks.torch_cases import LR, Bench
from edm2_core.network import NetworkConfig, multiply_adds
from edm2_core.presets import preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one case."""

    port: Annotated[str, tyro.conf.Positional]
    """torch or jax."""
    network: Annotated[str, tyro.conf.Positional]
    """bench-32, xs or s."""
    peak: float
    """Floating-point operations a second of a product of matrices."""
    rounds: int = 5
    """Timed repetitions."""
    device: str | None = None
    """Device; the fastest by default."""
    tiny: bool = False
    """A network of a few channels, and small batches."""


def main(options: Options) -> None:
    name, config, batch = network(options.network, tiny=options.tiny)
    rows = {"torch": torch_rows, "jax": jax_rows}[options.port](name, config, batch, options)
    next(rows)
    print("ready", flush=True)
    sys.stdin.readline()
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)


def network(name: str, *, tiny: bool) -> tuple[str, NetworkConfig, int]:
    """Its name in words, and the images of a step."""
    config, batch = (BENCH_32, 256) if name == "bench-32" else (preset(f"img512-{name}").network, 128)
    name = name if name == "bench-32" else f"{name.upper()} 64x64x4"
    if not tiny:
        return name, config, batch
    return f"{name}, tiny", replace(config, model_channels=8, channels_per_head=8, num_blocks=1), 4


def torch_rows(name: str, config: NetworkConfig, batch: int, options: Options) -> Iterator[Row]:
    device, steps = devices.choose(options.device), 4 if options.tiny else 32
    devices.allow_tf32(device)
    dtype, plain = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.float32)
    bench = Bench(name, config, device, dtype, plain, compile_mode("auto", device))
    first = cases.first_step(bench, batch)
    yield Row(f"{name}: first step", {"ours": first})  # not shown: the others compile beside it
    rounds, peak, few = options.rounds, options.peak, max(1, batch // 4)
    step = cases.step(bench, batch, rounds=rounds, peak=peak)
    yield replace(step, notes=step.notes | {"first step, beside others": f"{first:.0f} s"})
    yield cases.averages(bench, rounds=rounds, step_seconds=step.seconds["ours"])
    yield cases.forward(bench, batch, rounds=rounds, peak=peak)
    yield cases.sampling(bench, few, rounds=1, steps=steps)
    if config.label_dim:
        yield cases.sampling(bench, few, rounds=1, steps=steps, guidance=1.5)
    eager = replace(bench, name=f"{name}, eager", mode=None)
    yield from cases.growth(eager, (max(1, batch // 4), max(1, batch // 2), batch), rounds=rounds)


def jax_rows(name: str, config: NetworkConfig, batch: int, options: Options) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from backends.jax import device as jax_devices
    from backends.jax.step import Batch, compiled, init, make_network_step, state_shapes
    from edm2_core.network import initialize

    start, lengths = time.perf_counter(), (0.05, 0.10)
    (device, *_) = jax_devices.choose(options.device)
    rng, shape = np.random.default_rng(0), (batch, *config.image_size, config.img_channels)
    images, noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    sigma = np.exp(rng.standard_normal((batch, 1, 1, 1), dtype=np.float32))
    labels = (
        np.eye(config.label_dim, dtype=np.float32)[np.arange(batch) % config.label_dim] if config.label_dim else None
    )
    with jax.default_device(device):
        rest = (Batch(*map(jax.device_put, (0.5 * images, noise, sigma, labels))), jax.random.key(0), jnp.float32(LR))
        step_of = make_network_step(
            config, sigma_rels=lengths, dtype=getattr(jnp, jax_devices.fastest_precision(device))
        )
        step = compiled(
            lambda state, batch, key, lr: step_of(state, batch, key, lr=lr),
            state_shapes(config, sigma_rels=lengths),
            *rest,
            platform=device.platform,
        )
        state = [init(config, initialize(config, seed=0), sigma_rels=lengths)]
        yield Row("first step", {"jax": time.perf_counter() - start})
        first = time.perf_counter() - start

        def run() -> None:
            state[0], metrics = step(state[0], *rest)
            metrics.loss.copy_to_host_async()

        seconds = in_turns(
            {"ours": repeated(run)}, rounds=options.rounds, settle=lambda: jax.block_until_ready(state[0])
        )
    each = seconds["ours"] / cases.TOGETHER
    flops = 6.0 * multiply_adds(config) * batch
    notes = {"of the product peak": f"{flops / each / options.peak:.0%}", "images/s": f"{batch / each:.0f}"}
    yield Row(
        f"{name}: step in JAX, batch {batch}", {"ours": each}, notes | {"first step, beside others": f"{first:.0f} s"}
    )


def repeated(run: Callable[[], object]) -> Callable[[], object]:
    return lambda: [run() for _ in range(cases.TOGETHER)]


if __name__ == "__main__":
    main(tyro.cli(Options))
