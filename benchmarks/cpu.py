"""The PyTorch port on this CPU beside plain PyTorch. Needs an idle machine for four minutes.

python -m benchmarks.cpu                                  # writes build/benchmarks/cpu.md after each case
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from backends.torch import device as devices
from benchmarks import torch_cases as cases
from benchmarks.ema_reconstruct import machine
from benchmarks.networks import BENCH_32
from benchmarks.rounds import Table
from benchmarks.torch_cases import Bench
from edm2_core.presets import preset


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    rounds: int = 5
    """Timed repetitions of each candidate."""
    paper: bool = True
    """Also a forward pass of the paper's XS and S at 64x64x4."""
    bfloat16: bool = False
    """Also a step in bfloat16, beside the plain one in float32, for CPUs with hardware for it."""
    out: Path = Path("build/benchmarks/cpu")
    """Files to write, without suffix."""


def main(options: Options) -> None:
    device, rounds = devices.choose("cpu"), options.rounds
    peak = cases.product_peak(device, torch.float32)
    table = Table(
        options.out,
        f"{machine()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32; a product of matrices "
        f"reaches {peak / 1e9:.0f} GFLOP/s. Plain: eager PyTorch. Medians of {rounds} rounds, in turns.",
    )
    bench = Bench("bench-32", BENCH_32, device)
    step = cases.step(bench, 16, rounds=rounds, peak=peak)
    table.add(step)
    if options.bfloat16:
        narrow = replace(bench, name="bench-32, ours in bfloat16", dtype=torch.bfloat16)
        table.add(cases.step(narrow, 16, rounds=rounds, peak=peak))
    table.add(cases.averages(bench, rounds=rounds, step_seconds=step.seconds["ours"]))
    table.add(cases.forward(bench, 16, rounds=rounds, peak=peak))
    for row in cases.growth(bench, (4, 8, 16), rounds=rounds):
        table.add(row)
    digits = Bench("digits", preset("digits").network, device)
    table.add(cases.step(digits, 128, rounds=rounds, peak=peak))
    table.add(cases.losses(digits, 64))
    table.add(cases.sampling(digits, 64, rounds=3))
    table.add(cases.sampling(digits, 64, rounds=3, guidance=2.0))
    for name in ("xs", "s") if options.paper else ():
        paper = Bench(f"{name.upper()} 64x64x4", preset(f"img512-{name}").network, device)
        table.add(cases.forward(paper, 2, rounds=rounds, peak=peak))


if __name__ == "__main__":
    main(tyro.cli(Options))
