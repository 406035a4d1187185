"""Time and memory of a training step in each port, on the same network and batch; writes docs/benchmark_ports.md.

    python -m benchmarks.ports_step [--steps 8] [--ports torch jax mlx]

MLX's CPU build on Linux is slow, so mlx is measured only if --ports names it.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from backends.pipeline.runs import freed_memory
from benchmarks.ema_reconstruct import machine
from benchmarks.networks import BENCH_32
from edm2_core.network import initialize

BATCH = 16


def main(*, steps: int = 8, ports: tuple[str, ...] = ("torch", "jax")) -> None:
    """Measure each of PORTS over STEPS timed steps, and write the table to docs/benchmark_ports.md."""
    rows = {name: _child(name, steps, "kept") for name in ports}
    given_back = {name: _child(name, steps, "given back") for name in ports}
    base = rows[ports[0]]
    table = "\n".join(
        f"| {name} | {row['ms']:.0f} ms | {row['ms'] / base['ms']:.2f} "
        f"| {given_back[name]['ms']:.0f} ms | {row['peak']:.0f} MB "
        f"| {row['peak'] / base['peak']:.2f} | {row['first']:.0f} s |"
        for name, row in rows.items()
    )
    text = f"""# A training step of each port

Measured by `python -m benchmarks.ports_step` on {machine()}; medians of {steps} steps after the first two.
32x32x3, 64 channels x1,2,3, two blocks, attention at 16 and 8, batch 16, float32, on the CPU, each port in its own
process. Memory is the peak of the process, including Python, the framework and its compiler if it has one. The commands
keep freed memory for the next step; by default, glibc gives it back to the system.

| port | step | x {ports[0]} | freed memory given back | peak memory | x {ports[0]} | end of the first step |
|---|---|---|---|---|---|---|
{table}
"""
    print(text)
    (Path(__file__).parents[1] / "docs" / "benchmark_ports.md").write_text(text)


def _child(name: str, steps: int, freed: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ports_step", "child", name, str(steps), freed]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def _run_child(name: str, steps: int, freed: str) -> None:
    if freed == "kept":
        freed_memory.keep()
    start = time.perf_counter()
    step = {"torch": _torch, "jax": _jax, "mlx": _mlx}[name]()
    step()
    first, seconds = time.perf_counter() - start, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"ms": 1000 * statistics.median(seconds[1:]), "first": first, "peak": peak}))


def _arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng, shape = np.random.default_rng(0), (BATCH, 3, 32, 32)
    images, noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return 0.5 * images, noise, np.exp(rng.standard_normal((BATCH, 1, 1, 1), dtype=np.float32) - 0.4)


def _torch() -> Callable[[], Any]:
    import torch

    from backends.torch.compiling import made_ready
    from backends.torch.step import Batch, Learner
    from backends.torch.weights import build

    network = build(BENCH_32, initialize(BENCH_32, seed=0))
    made_ready(network, torch.device("cpu"), None)
    learner = Learner(network)
    batch = Batch(*map(torch.from_numpy, _arrays()))
    return lambda: float(learner.step(batch, lr=0.01)[0])


def _jax() -> Callable[[], Any]:
    import jax

    from backends.jax import device
    from backends.jax.step import Batch, compiled, init, make_network_step, state_shapes
    from backends.jax.weights import to_nhwc

    device.choose("cpu")
    images, noise, sigma = _arrays()
    batch = Batch(*map(jax.device_put, (to_nhwc(images), to_nhwc(noise), sigma)))
    rest, lengths = (batch, jax.random.key(0), jax.numpy.float32(0.01)), (0.05, 0.10)
    step_of = make_network_step(BENCH_32, sigma_rels=lengths)
    step = compiled(
        lambda state, batch, key, lr: step_of(state, batch, key, lr=lr),
        state_shapes(BENCH_32, sigma_rels=lengths),
        *rest,
        platform="cpu",
    )
    state = [init(BENCH_32, initialize(BENCH_32, seed=0), sigma_rels=lengths)]

    def run() -> float:
        state[0], metrics = step(state[0], *rest)
        return float(metrics.loss)

    return run


def _mlx() -> Callable[[], Any]:
    import mlx.core as mx

    from backends.mlx.step import Batch, Learner
    from backends.mlx.weights import build, to_native

    mx.set_default_device(mx.cpu)
    learner = Learner(build(BENCH_32, initialize(BENCH_32, seed=0)))
    batch = Batch(*map(to_native, _arrays()))
    return lambda: learner.step(batch, lr=0.01)[0].item()


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _run_child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        tyro.cli(main)
