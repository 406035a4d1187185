"""The PyTorch port on one GPU beside plain eager PyTorch in float16: ten minutes, no network.

    python -m benchmarks.gpu                                  # writes build/benchmarks/gpu.md after each case
    python -m benchmarks.gpu --device cpu --tiny              # the same cases in a minute, to try them

Networks: bench-32 (:mod:`benchmarks.networks`), and the paper's XS and S at 64x64x4. Cases that do not fit
into the time that is left are skipped, and said so.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from backends.torch import device as devices
from backends.torch.compiling import compile_mode
from benchmarks import torch_cases as cases
from benchmarks.networks import BENCH_32
from benchmarks.rounds import Row, Table
from benchmarks.torch_cases import Bench
from edm2_core.network import NetworkConfig
from edm2_core.presets import preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    device: str | None = None
    """Device; the fastest by default."""
    seconds: float = 600.0
    """Time for all cases."""
    rounds: int = 5
    """Timed repetitions of each candidate."""
    tiny: bool = False
    """Networks of a few channels and small batches."""
    out: Path = Path("build/benchmarks/gpu")
    """Files to write, without suffix."""


def main(options: Options) -> None:
    device = devices.choose(options.device)
    devices.allow_tf32(device)
    end = time.monotonic() + options.seconds
    on_cuda = device.type == "cuda"
    dtype, plain = (torch.bfloat16, torch.float16) if on_cuda else (torch.float32, torch.float32)
    peaks = {of: cases.product_peak(device, of, size=8192 if on_cuda else 1024) for of in (torch.float32, dtype)}
    shown = ", ".join(f"{str(of).removeprefix('torch.')} {peak / 1e12:.2f} TFLOP/s" for of, peak in peaks.items())
    table = Table(
        options.out,
        f"{devices.describe(device)}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}. Products of square "
        f"matrices: {shown}. Ours: {_name(dtype)}; plain: eager, {_name(plain)}. Medians of {options.rounds} rounds, "
        "in turns.",
    )
    for name, config, batch in _networks(tiny=options.tiny):
        mode = compile_mode("auto", device)
        bench = Bench(name, config, device, dtype, plain, mode)
        for case in _cases(bench, batch, options, peaks[dtype]):
            if time.monotonic() > end:
                print(f"skipped  the rest of {name}: {options.seconds:.0f} s are over")
                break
            for row in case():
                table.add(row)
        del bench
        if on_cuda:
            torch.cuda.empty_cache()
    _data(end)


def _cases(bench: Bench, batch: int, options: Options, peak: float) -> list[Callable[[], list[Row]]]:
    rounds, steps = options.rounds, 4 if options.tiny else 32
    guided = bench.config.label_dim > 0
    seconds: dict[str, float] = {}

    def step() -> list[Row]:
        row = cases.step(bench, batch, rounds=rounds, peak=peak)
        seconds["step"] = row.seconds["ours"]
        return [row]

    return [
        step,
        lambda: [cases.averages(bench, rounds=rounds, step_seconds=seconds["step"])],
        lambda: [cases.forward(bench, batch, rounds=rounds, peak=peak)],
        lambda: [cases.sampling(bench, batch, rounds=1, steps=steps)],
        lambda: [cases.sampling(bench, batch, rounds=1, steps=steps, guidance=1.5)] if guided else [],
        lambda: cases.growth(
            replace(bench, name=f"{bench.name}, eager", mode=None), (batch // 4, batch // 2, batch), rounds=rounds
        ),
    ]


def _networks(*, tiny: bool) -> list[tuple[str, NetworkConfig, int]]:
    """Name, network and images of a step."""
    paper = {name: preset(f"img512-{name}").network for name in ("xs", "s")}
    found = [("bench-32", BENCH_32, 256), ("XS 64x64x4", paper["xs"], 128), ("S 64x64x4", paper["s"], 128)]
    if not tiny:
        return found
    return [
        (f"{name}, tiny", replace(config, model_channels=8, channels_per_head=8, num_blocks=1), 4)
        for name, config, _ in found
    ]


def _data(end: float) -> None:
    """The data pipeline's own benchmark, where there is time for it."""
    if end - time.monotonic() > 60:
        command = [sys.executable, "-m", "benchmarks.data", "--images", "2000", "--photographs", "300", "--rounds", "1"]
        subprocess.run([*command, "--seconds", "1", "--out", "build/benchmarks/data.md"], check=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(tyro.cli(Options))
