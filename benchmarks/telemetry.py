"""The cost of ``--telemetry 50``: plain and measured steps in each port; writes docs/benchmark_telemetry.md.

python -m benchmarks.telemetry [--steps 10] [--ports torch jax mlx]
"""

import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from backends.pipeline.data.batches import stored_batch
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.resolve import configure
from backends.ports import Machine
from benchmarks.ema_reconstruct import machine

EVERY = 50
TRAINERS = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}


def main(*, steps: int = 10, ports: tuple[str, ...] = ("torch", "jax", "mlx")) -> None:
    """Time STEPS plain and measured steps in each of PORTS, and write the table to docs/benchmark_telemetry.md."""
    table = "\n".join(row(name, *seconds(name, steps)) for name in ports)
    text = f"""# The cost of telemetry

Measured by `python -m benchmarks.telemetry` on {machine()}; medians of {steps} plain and {steps} measured
steps, alternating, digits preset, float32, on the CPU. Last column: the time that `--telemetry {EVERY}` adds to a run.

| port | step | measured step | x | at every {EVERY} |
|---|---|---|---|---|
{table}
"""
    print(text)
    (Path(__file__).parents[1] / "docs" / "benchmark_telemetry.md").write_text(text)


def row(name: str, plain: float, measured: float) -> str:
    share = (measured - plain) / (EVERY * plain)
    return f"| {name} | {plain * 1e3:.0f} ms | {measured * 1e3:.0f} ms | {measured / plain:.2f} | {share:+.1%} |"


def seconds(name: str, steps: int) -> tuple[float, float]:
    """Median seconds of a plain and of a measured step, after one of each to warm up."""
    dataset = open_dataset("digits")
    config = configure(dataset, telemetry=EVERY)
    trainer = getattr(import_module(f"backends.{name}.trainer"), TRAINERS[name])(config, Machine())
    indices = np.arange(config.hyper.batch)
    batch = trainer.place(stored_batch(dataset, indices))
    pairs = [(timed(trainer, trainer.step, batch), timed(trainer, trainer.measured_step, batch))
             for _ in range(steps + 1)]  # fmt: skip
    plain, measured = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    return plain, measured


def timed(trainer: Any, step: Callable[..., Any], batch: Any) -> float:
    start = time.perf_counter()
    step(batch, lr=0.01)
    trainer.metrics()  # waits for the step to complete
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main)
