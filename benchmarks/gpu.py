"""The ports on one GPU beside plain eager PyTorch in float16: ten minutes, no network.

    python -m benchmarks.gpu                                  # writes build/benchmarks/gpu.md after each case
    python -m benchmarks.gpu --device cpu --tiny              # the same cases in a minute, to try them

Each network of each port has a process of its own. They compile side by side, which takes most of the time, and are
timed one after another once all are ready. What is not ready by then, or does not fit into the time, is skipped, and
said so.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from backends.torch import device as devices
from benchmarks import torch_cases as cases
from benchmarks.rounds import Row, Table

_DATA = ["-m", "benchmarks.data", "--images", "2000", "--photographs", "300", "--rounds", "1", "--seconds", "1"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    device: str | None = None
    """Device; the fastest by default."""
    cases: tuple[str, ...] = ("torch:xs", "torch:s", "torch:bench-32", "jax:xs")
    """PORT:NETWORK, timed in this order; networks are bench-32 and the paper's xs and s at 64x64x4."""
    compile_seconds: float = 300.0
    """Time for compilation."""
    seconds: float = 600.0
    """Time for all."""
    rounds: int = 5
    """Timed repetitions of each candidate."""
    tiny: bool = False
    """Networks of a few channels and small batches."""
    out: Path = Path("build/benchmarks/gpu")
    """Files to write, without suffix."""


@dataclass(frozen=True)
class Child:
    """The process that compiles and times ``case``."""

    case: str
    process: "subprocess.Popen[bytes]"

    @classmethod
    def start(cls, case: str, options: Options, peak: float) -> "Child":
        port, _, network = case.partition(":")
        words = [port, network, "--rounds", str(options.rounds), "--peak", str(peak)]
        words += ["--device", options.device] if options.device else []
        words += ["--tiny"] if options.tiny else []
        command = [sys.executable, "-m", "benchmarks.gpu_case", *words]
        shared = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # leaves memory to the other processes
        pipe = subprocess.PIPE
        # unbuffered: what is left to read is then what select sees
        return cls(case, subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=shared))

    def is_ready(self, until: float) -> bool:
        """Whether it has compiled before ``until``; if not, it is ended."""
        assert self.process.stdout is not None
        there, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
        if there and self.process.stdout.readline():
            return True
        print(f"skipped  {self.case}: it has not compiled", flush=True)
        self.process.kill()
        return False

    def rows(self, until: float) -> Iterator[Row]:
        """What it measures, until then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"go\n")
        while select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (line := self.process.stdout.readline()):
                return
            yield Row(**json.loads(line))
        print(f"skipped  the rest of {self.case}: the time is over", flush=True)
        self.process.kill()


def main(options: Options) -> None:
    start = time.monotonic()
    device = devices.choose(options.device)
    devices.allow_tf32(device)
    on_cuda = device.type == "cuda"
    dtype, plain = (torch.bfloat16, torch.float16) if on_cuda else (torch.float32, torch.float32)
    peaks = {of: cases.product_peak(device, of, size=8192 if on_cuda else 1024) for of in (torch.float32, dtype)}
    shown = ", ".join(f"{_name(of)} {peak / 1e12:.2f} TFLOP/s" for of, peak in peaks.items())
    table = Table(
        options.out,
        f"{devices.describe(device)}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}. Products of square "
        f"matrices: {shown}. Ours: {_name(dtype)}; plain: eager, {_name(plain)}. Medians of {options.rounds} rounds, "
        "in turns.",
    )
    children = [Child.start(case, options, peaks[dtype]) for case in options.cases]
    ready = [child for child in children if child.is_ready(start + options.compile_seconds)]
    for child in ready:
        for row in child.rows(start + options.seconds):
            table.add(row)
    if start + options.seconds - time.monotonic() > 60:
        subprocess.run([sys.executable, *_DATA, "--out", "build/benchmarks/data.md"], check=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(tyro.cli(Options))
