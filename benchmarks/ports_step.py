"""A training step of each port on the same network and batch, side by side: time and memory.

    python -m benchmarks.ports_step [--steps 8] [--ports torch jax mlx]

32x32x3, 64 channels x1,2,3, two blocks, attention at 16 and 8, batch 16, float32, on the CPU; each port in a process of
its own. Times are medians of steps after the first two; memory is the process's peak, with Python and its framework.
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

from edm2_core.network import NetworkConfig, initialize

CONFIG = NetworkConfig(
    img_resolution=32,
    img_channels=3,
    model_channels=64,
    channel_mult=(1, 2, 3),
    num_blocks=2,
    attn_resolutions=(16, 8),
    channels_per_head=64,
)
BATCH = 16


def main(*, steps: int = 8, ports: tuple[str, ...] = ("torch", "jax", "mlx")) -> None:
    """Print a row for each of PORTS, after STEPS timed steps."""
    rows = {name: _child(name, steps) for name in ports}
    base = rows[ports[0]]
    print("port    ms per step  x first  peak MB  x first  first step s")
    for name, row in rows.items():
        ratios = row["ms"] / base["ms"], row["peak"] / base["peak"]
        print(
            f"{name:6}  {row['ms']:11.0f}  {ratios[0]:7.2f}  {row['peak']:7.0f}  {ratios[1]:7.2f}  {row['first']:12.1f}"
        )


def _child(name: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ports_step", "child", name, str(steps)]
    shown = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(shown.stdout.splitlines()[-1])
    return found


def _run_child(name: str, steps: int) -> None:
    start = time.perf_counter()
    step = {"torch": _torch, "jax": _jax, "mlx": _mlx}[name]()
    step()
    first, seconds = time.perf_counter() - start, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"ms": 1000 * statistics.median(seconds[1:]), "first": first, "peak": peak}))


def _arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng, shape = np.random.default_rng(0), (BATCH, 3, 32, 32)
    images, noise = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return 0.5 * images, noise, np.exp(rng.standard_normal((BATCH, 1, 1, 1), dtype=np.float32) - 0.4)


def _torch() -> Callable[[], Any]:
    import torch

    from backends.torch.step import Batch, Training
    from backends.torch.weights import build

    training = Training(build(CONFIG, initialize(CONFIG, seed=0)))
    batch = Batch(*map(torch.from_numpy, _arrays()))
    return lambda: float(training.step(batch, lr=0.01)[0])


def _jax() -> Callable[[], Any]:
    import jax

    from backends.jax.step import Batch, compiled, init, make_step
    from backends.jax.weights import to_nhwc

    images, noise, sigma = _arrays()
    batch = Batch(*map(jax.device_put, (to_nhwc(images), to_nhwc(noise), sigma)))
    rest = (batch, jax.numpy.float32(0.01), jax.random.key(0))
    state = [init(CONFIG, initialize(CONFIG, seed=0), sigma_rels=(0.05, 0.10))]
    step = compiled(make_step(CONFIG), state[0], *rest, cpu=True)

    def run() -> float:
        state[0], metrics = step(state[0], *rest)
        return float(metrics.loss)

    return run


def _mlx() -> Callable[[], Any]:
    import mlx.core as mx

    from backends.mlx.step import Batch, Training
    from backends.mlx.weights import build, to_nhwc

    mx.set_default_device(mx.cpu)
    images, noise, sigma = _arrays()
    training = Training(build(CONFIG, initialize(CONFIG, seed=0)))
    batch = Batch(to_nhwc(images), to_nhwc(noise), mx.array(sigma))
    return lambda: float(training.step(batch, lr=0.01)[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _run_child(sys.argv[2], int(sys.argv[3]))
    else:
        tyro.cli(main)
