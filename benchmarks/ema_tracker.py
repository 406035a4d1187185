"""What averages cost while a model trains, beside ema-pytorch; puts its figures into docs/benchmarks.md.

    python -m benchmarks.ema_tracker [--rounds 5]

``PowerEMA`` and ``PostHocEMA`` track two lengths of the same model of 11M parameters, on one thread, and save them in
float16 on the same disk. They alternate; each figure is the median over the rounds, of seconds and of CPU seconds of
this process. Ours is flushed to disk, with a checksum; ema-pytorch's are left to the system.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro

from backends.torch.ema import PowerEMA
from benchmarks.ema_reconstruct import LENGTHS, ROOT, machine, module, version

UPDATES, SAVES = 60, 3
START, END = "<!-- made by benchmarks.ema_tracker -->", "<!-- end of it -->"


def main(*, rounds: int = 5) -> None:
    """Measure over ROUNDS, and replace the figures in docs/benchmarks.md."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="edm2-bench-") as folder:
        jobs = {"edm2": _ours(Path(folder, "ours")), "ema-pytorch": _theirs(Path(folder, "theirs"))}
        runs = [{name: job() for name, job in jobs.items()} for _ in range(rounds + 1)][1:]
    text = _report(runs)
    print(text)
    page = ROOT / "docs" / "benchmarks.md"
    before = page.read_text(encoding="utf-8").partition(START)[0].rstrip()
    page.write_text(f"{before}\n\n{START}\n{text}{END}\n", encoding="utf-8")


def _model() -> torch.nn.Module:
    model = module()
    for index, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(index))
    return model


def _ours(folder: Path) -> Callable[[], dict[str, list[float]]]:
    model, clock = _model(), [0]
    ema = PowerEMA(model, sigma_rels=LENGTHS)

    def update() -> None:
        clock[0] += 1
        ema.update(time=clock[0], delta=1)

    return lambda: _job(update, lambda: ema.save(folder))


def _theirs(folder: Path) -> Callable[[], dict[str, list[float]]]:
    from ema_pytorch import PostHocEMA

    kept = {"checkpoint_folder": str(folder), "checkpoint_every_num_steps": "manual"}
    ema = PostHocEMA(_model(), sigma_rels=LENGTHS, update_every=1, **kept)
    return lambda: _job(ema.update, ema.checkpoint)


def _job(update: Callable[[], object], save: Callable[[], object]) -> dict[str, list[float]]:
    """Wall seconds and CPU seconds of an update and of a save, means over the job; they alternate as in training."""
    seconds = {"update": [0.0, 0.0], "save": [0.0, 0.0]}
    for _ in range(SAVES):
        for name, work, times in (("update", update, UPDATES // SAVES), ("save", save, 1)):
            start = time.perf_counter(), time.process_time()
            for _ in range(times):
                work()
            total = UPDATES if name == "update" else SAVES
            seconds[name][0] += (time.perf_counter() - start[0]) / total
            seconds[name][1] += (time.process_time() - start[1]) / total
    return seconds


def _report(runs: list[dict[str, dict[str, list[float]]]]) -> str:
    names, rows = list(runs[0]), []
    for what in ("update", "save"):
        for index, kind in enumerate(("seconds", "CPU seconds")):
            ours, theirs = (median(run[name][what][index] for run in runs) for name in names)
            rows.append(f"| {what} | {kind} | {1e3 * ours:.1f} ms | {1e3 * theirs:.1f} ms | {theirs / ours:.2f} |")
    table = "\n".join(rows)
    return f"""## Averages while a model trains

`python -m benchmarks.ema_tracker` on {machine()}, PyTorch {torch.__version__},
one thread: two averages of a model of 11M parameters, {UPDATES} updates and {SAVES} saves in float16, in turns
with `PostHocEMA` of {version("ema_pytorch")}; medians of {len(runs)} rounds. Ours are flushed to the disk, with
checksums; those of ema-pytorch are left to the system.

| | | edm2 | ema-pytorch | x faster |
|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    tyro.cli(main)
