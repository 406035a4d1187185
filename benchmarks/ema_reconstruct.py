"""Reconstruction beside ema-pytorch's, and beside the time just to read the files; writes docs/benchmarks.md.

    python -m benchmarks.ema_reconstruct [--folder FOLDER] [--repeats 3]

64 snapshots of an 11M-parameter network in float16, the same values for both sides: ours in ``edm2 reconstruct``,
theirs in ``PostHocEMA.synthesize_ema_model``, called once per output. Each side runs in a process of its own, with what
it needs imported before the clock starts, and its results are written and synchronized to the disk. ``reading`` is
safetensors' ``load_file`` of every file in turn. Files are in the page cache; ``cold`` rows drop them from it first.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro

LENGTHS = (0.05, 0.10)
SHAPES = {f"layer{i}.weight": (512, 512, 3, 3) for i in range(4)} | {f"head{i}.weight": (512, 512) for i in range(6)}
TARGETS = [round(float(s), 3) for s in np.geomspace(0.015, 0.25, 25)]
ROOT = Path(__file__).parents[1]


def main(*, folder: Path | None = None, repeats: int = 3) -> None:
    """Measure in FOLDER (about 20 GB at most; none: a temporary one), each figure the median of REPEATS runs."""
    with TemporaryDirectory(prefix="edm2-bench-") as temporary:
        text = _report(Path(folder or temporary), repeats)
    print(text)
    (ROOT / "docs" / "benchmarks.md").write_text(text)


def _report(folder: Path, repeats: int) -> str:
    stored = _make(folder / "64", files=64)
    reading = {cold: _measure(repeats, "read", stored, cold) for cold in (False, True)}
    ours = {(n, cold): _measure(repeats, "ours", stored, cold, n) for n in (1, 25) for cold in (False, True)}
    theirs = {
        n: _measure(1 if n > 1 else repeats, "theirs", _make_torch(folder / "torch", 64), False, n) for n in (1, 25)
    }
    rows = "\n".join(_row(n, reading, ours, theirs[n]) for n in (1, 25))
    files = {n: _measure(repeats, "ours", _make(folder / str(n), files=n), False, 25) for n in (16, 32)} | {
        64: ours[25, False]
    }
    linear = "\n".join(
        f"| {n} | {row['seconds']:.2f} s | {1000 * row['seconds'] / n:.0f} ms |" for n, row in files.items()
    )
    big = _measure(1, "ours", _make(folder / "big", files=16, times=10), False, 4)
    small = _measure(1, "ours", _make(folder / "16", files=16), False, 4)
    flat = "\n".join(
        f"| {name} | {row['seconds']:.2f} s | {row['peak']:.0f} MB |" for name, row in (("11 M", small), ("110 M", big))
    )
    return f"""# Benchmarks

Measured by `nox -s bench_ema` on {_machine()}; medians of {repeats} runs, times in seconds.

## Reconstruction of averages

64 snapshots of an 11M-parameter network in float16, 1.4 GB. Reading every file with safetensors takes
{reading[False]["seconds"]:.2f} s from the page cache and {reading[True]["seconds"]:.2f} s from the disk; `x reading`
is the ratio to that. ema-pytorch is {_version("ema_pytorch")}'s `synthesize_ema_model`, once per output, from the page
cache, as are ours in `x faster`. Outputs of both are on the disk at the end. Peak memory is that of the process, with
Python and what it imports; ours ran with `--memory 1Gi`.

| outputs | ours, cached | x reading | ours, from disk | x reading | ema-pytorch | x faster | our peak | its peak |
|---|---|---|---|---|---|---|---|---|
{rows}

25 outputs, by the number of files:

| files | time | per file |
|---|---|---|
{linear}

4 outputs of 16 files, by the size of the network:

| parameters | time | our peak |
|---|---|---|
{flat}
"""


def _row(n: int, reading: dict[bool, Any], ours: dict[tuple[int, bool], Any], theirs: dict[str, float]) -> str:
    cells = [str(n)]
    for cold in (False, True):
        seconds = ours[n, cold]["seconds"]
        cells += [f"{seconds:.2f} s", f"{seconds / reading[cold]['seconds']:.2f}"]
    cells += [f"{theirs['seconds']:.1f} s", f"{theirs['seconds'] / ours[n, False]['seconds']:.1f}"]
    cells += [f"{side['peak']:.0f} MB" for side in (ours[n, False], theirs)]
    return "| " + " | ".join(cells) + " |"


def _measure(repeats: int, *job: Any) -> dict[str, float]:
    runs = [_child(*job) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak")}


def _child(*job: Any) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ema_reconstruct", "child", json.dumps([str(word) for word in job])]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(shown.stdout.splitlines()[-1])
    return found


def _run_child(kind: str, folder: str, cold: str, outputs: str = "1") -> None:
    jobs: dict[str, Callable[[Path, list[float], Path], Callable[[], None]]] = {
        "read": _read,
        "ours": _ours,
        "theirs": _theirs,
    }
    with TemporaryDirectory(dir=Path(folder).parent) as out:
        work = jobs[kind](Path(folder), TARGETS[:: len(TARGETS) // int(outputs)][: int(outputs)], Path(out))
        if cold == "True":
            for path in Path(folder).iterdir():
                _drop(path)
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": _peak()}))


def _peak() -> float:
    """Most memory this process had, in MB. Not getrusage's where there is better: that begins with the parent's."""
    own = [line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM")]
    return int(own[0]) / 1024 if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _drop(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _read(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    from safetensors.numpy import load_file

    def work() -> None:
        for path in folder.iterdir():
            load_file(path)

    return work


def _ours(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    import backends.tools.reconstruct  # noqa: F401  what the command imports when it is called
    from backends.tools.cli import main as edm2

    words = ["reconstruct", str(folder), "--sigma-rels", *map(str, targets), "--outdir", str(out), "--memory", "1Gi"]

    def work() -> None:
        if edm2(words):
            raise SystemExit("edm2 reconstruct failed")

    return work


def _theirs(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    import torch
    from ema_pytorch import PostHocEMA

    ema = PostHocEMA(_module(), sigma_rels=LENGTHS, checkpoint_folder=str(folder), checkpoint_every_num_steps="manual")

    def work() -> None:
        for target in targets:
            made = ema.synthesize_ema_model(sigma_rel=target)
            state = {name: tensor.half() for name, tensor in made.ema_model.state_dict().items()}
            with open(out / f"{target}.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())

    return work


def _module() -> Any:
    import torch

    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.zeros(shape))
        module.add_module(name.removesuffix(".weight"), layer)
    return module


def _make(folder: Path, *, files: int, times: int = 1) -> Path:
    """Snapshots at equal intervals; ``times`` as many parameters."""
    from backends.pipeline.snapshots import Snapshot, save_snapshot

    if not folder.exists():
        generator, shapes = np.random.default_rng(0), {n: (times * s[0], *s[1:]) for n, s in SHAPES.items()}
        params = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        for index in range(files):
            step, sigma_rel = (index // 2 + 1) * 1000, LENGTHS[index % 2]
            snapshot = Snapshot(params=params, config=None, nimg=step, sigma_rel=sigma_rel)
            save_snapshot(folder / f"{step:012d}-{sigma_rel:.3f}.safetensors", snapshot)
    return folder


def _make_torch(folder: Path, files: int) -> Path:
    import torch

    if not folder.exists():
        folder.mkdir()
        generator = np.random.default_rng(0)
        arrays = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
        for index in range(files):
            state = {f"ema_model.{name}": torch.from_numpy(array).half() for name, array in arrays.items()}
            state |= {"initted": torch.tensor(1.0).half(), "step": torch.tensor((index // 2 + 1) * 1000.0).half()}
            torch.save(state, folder / f"{index % 2}.{(index // 2 + 1) * 1000}.pt")
    return folder


def _version(package: str) -> str:
    from importlib.metadata import version

    return f"{package.replace('_', '-')} {version(package)}"


def _machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "a CPU"
    )
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, NumPy {np.__version__}"


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _run_child(*json.loads(sys.argv[2]))
    else:
        tyro.cli(main)
