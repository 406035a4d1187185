"""Speed and memory of reconstruction, compared with ema-pytorch and with reading the files; writes docs/benchmarks.md.

    python -m benchmarks.ema_reconstruct [--folder FOLDER] [--repeats 3]

Both libraries read 64 snapshots of an 11M-parameter network in float16, with the same values. ``reconstruct`` of edm2
and ``PostHocEMA.synthesize_ema_model``, called once per output, leave the averages in memory; the command ``edm2
reconstruct`` also writes them to disk. Each job runs in its own process, which imports everything before timing starts.
``reading`` is safetensors' ``load_file`` of every file in turn. Files are in the page cache; ``cold`` runs drop them
from it first. Jobs alternate, so that other load on the machine affects all of them.
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
    """Measure in FOLDER (needs up to 20 GB; by default a temporary one); each figure is the median of REPEATS runs."""
    with TemporaryDirectory(prefix="edm2-bench-") as temporary:
        text = _report(Path(folder or temporary), repeats)
    print(text)
    (ROOT / "docs" / "benchmarks.md").write_text(text)


def _report(folder: Path, repeats: int) -> str:
    stored, torch_stored = _make(folder / "64", files=64), _make_torch(folder / "torch", 64)
    jobs: dict[tuple[Any, ...], tuple[Any, ...]] = {("read", cold): ("read", stored, cold) for cold in (False, True)}
    for n in (1, 25):
        jobs |= {("command", n, cold): ("command", stored, cold, n) for cold in (False, True)}
        jobs |= {("ours", n): ("ours", stored, False, n), ("theirs", n): ("theirs", torch_stored, False, n)}
    measured = _measure_all(repeats, jobs)
    reading = [measured["read", cold]["seconds"] for cold in (False, True)]
    rows = ["\n".join(row(n, measured) for n in (1, 25)) for row in (_memory_row, _file_row)]
    files = _measure_all(repeats, {n: ("command", _make(folder / str(n), files=n), False, 25) for n in (16, 32, 64)})
    linear = "\n".join(
        f"| {n} | {row['seconds']:.2f} s | {1000 * row['seconds'] / n:.0f} ms |" for n, row in files.items()
    )
    sizes = _measure_all(
        repeats,
        {
            "11 M": ("command", _make(folder / "16", files=16), False, 4),
            "110 M": ("command", _make(folder / "big", files=16, times=10), False, 4),
        },
    )
    flat = "\n".join(f"| {name} | {row['seconds']:.2f} s | {row['peak']:.0f} MB |" for name, row in sizes.items())
    return f"""# Benchmarks

Measured by `nox -s bench_ema` on {machine()}; medians of {repeats} runs, times in seconds.

## Reconstruction of averages

64 snapshots of an 11M-parameter network in float16, 1.4 GB. Reading every file with safetensors takes
{reading[0]:.2f} s from the page cache and {reading[1]:.2f} s from the disk;
`x reading` is the ratio to that.

Averages in memory, from the page cache: `reconstruct` (`backends.pipeline.checkpoints`) and `synthesize_ema_model` of
{version("ema_pytorch")}, called once per output. The peak memory is that of ema-pytorch.

| outputs | edm2 | ema-pytorch | x faster | peak |
|---|---|---|---|---|
{rows[0]}

Averages in files, flushed to disk: `edm2 reconstruct --memory 1Gi`. Peak memory is that of the whole process, including
imported modules.

| outputs | cached | x reading | from disk | x reading | peak |
|---|---|---|---|---|---|
{rows[1]}

25 outputs, by number of files:

| files | time | per file |
|---|---|---|
{linear}

4 outputs from 16 files, by size of the network:

| parameters | time | peak |
|---|---|---|
{flat}
"""


def _memory_row(n: int, measured: dict[Any, dict[str, float]]) -> str:
    ours, theirs = measured["ours", n], measured["theirs", n]
    ratio = theirs["seconds"] / ours["seconds"]
    return f"| {n} | {ours['seconds']:.2f} s | {theirs['seconds']:.1f} s | {ratio:.1f} | {theirs['peak']:.0f} MB |"


def _file_row(n: int, measured: dict[Any, dict[str, float]]) -> str:
    cells = [str(n)]
    for cold in (False, True):
        seconds = measured["command", n, cold]["seconds"]
        cells += [f"{seconds:.2f} s", f"{seconds / measured['read', cold]['seconds']:.2f}"]
    return f"| {' | '.join(cells)} | {measured['command', n, False]['peak']:.0f} MB |"


def _measure_all(repeats: int, jobs: dict[Any, tuple[Any, ...]]) -> dict[Any, dict[str, float]]:
    """Medians over ``repeats`` rounds; every job runs once per round."""
    runs = [{key: _child(*job) for key, job in jobs.items()} for _ in range(repeats)]
    return {
        key: {name: statistics.median(run[key][name] for run in runs) for name in ("seconds", "peak")} for key in jobs
    }


def _child(*job: Any) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.ema_reconstruct", "child", json.dumps([str(word) for word in job])]
    process = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return measured


def _run_child(kind: str, folder: str, cold: str, outputs: str = "1") -> None:
    jobs: dict[str, Callable[[Path, list[float], Path], Callable[[], None]]] = {
        "read": _read,
        "command": _command,
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
    """Peak memory of this process in MB, from /proc if it exists: getrusage includes the parent's at the fork."""
    peak = [line.split()[1] for line in _lines("/proc/self/status") if line.startswith("VmHWM")]
    return int(peak[0]) / 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _drop(path: Path) -> None:
    """Drop a file from the page cache."""
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


def _command(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    # imported by the command and by tyro only when they run
    import array_api_compat.numpy  # noqa: F401
    import typeguard  # noqa: F401

    import backends.commands.reconstruct  # noqa: F401
    from backends.commands.cli import main as edm2

    words = ["reconstruct", str(folder), "--sigma-rels", *map(str, targets), "--outdir", str(out), "--memory", "1Gi"]

    def work() -> None:
        if edm2(words):
            raise SystemExit("edm2 reconstruct failed")

    return work


def _ours(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    import array_api_compat.numpy  # noqa: F401

    from backends.pipeline.checkpoints.reconstruct import reconstruct
    from backends.pipeline.checkpoints.sources import open_sources

    def work() -> None:
        reconstruct(open_sources(folder), sigma_rels=targets)

    return work


def _theirs(folder: Path, targets: list[float], out: Path) -> Callable[[], None]:
    from ema_pytorch import PostHocEMA

    ema = PostHocEMA(module(), sigma_rels=LENGTHS, checkpoint_folder=str(folder), checkpoint_every_num_steps="manual")

    def work() -> None:
        for target in targets:
            ema.synthesize_ema_model(sigma_rel=target)

    return work


def module() -> Any:
    import torch

    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.zeros(shape))
        module.add_module(name.removesuffix(".weight"), layer)
    return module


def _make(folder: Path, *, files: int, times: int = 1) -> Path:
    """Write snapshots at equal intervals, with ``times`` as many parameters."""
    from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, tracked_name
    from edm2_core.ema import Length

    if not folder.exists():
        generator, shapes = np.random.default_rng(0), {n: (times * s[0], *s[1:]) for n, s in SHAPES.items()}
        params = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        for index in range(files):
            step, length = (index // 2 + 1) * 1000, Length.of(LENGTHS[index % 2])
            snapshot = Snapshot(params=params, config=None, nimg=step, length=length)
            save_snapshot(folder / tracked_name(step, length), snapshot)
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


def version(package: str) -> str:
    from importlib.metadata import version

    return f"{package.replace('_', '-')} {version(package)}"


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "a CPU"
    )
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, NumPy {np.__version__}"


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _run_child(*json.loads(sys.argv[2]))
    else:
        tyro.cli(main)
