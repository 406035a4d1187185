"""Whether cost grows linearly: CPU seconds at three sizes each, per unit beside the smallest; writes docs/growth.md.

    python -m benchmarks.growth [--rounds 5]

CPU seconds of this process, since other work on the machine does not count in them; the least of the rounds.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import numpy as np
import torch
import tyro
from PIL import Image

from backends.pipeline.checkpoints.reconstruct import reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, tracked_name
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.checkpoints.states import save_state
from backends.pipeline.data.batches import Reading
from backends.pipeline.data.datasets import open_dataset
from backends.torch.denoiser import Denoiser
from backends.torch.ema import PowerEMA
from backends.torch.step import Batch, Learner
from backends.torch.weights import build
from benchmarks.ema_reconstruct import LENGTHS, ROOT, machine
from edm2_core.ema import Length
from edm2_core.network import initialize
from edm2_core.presets import PRESETS

Work = Callable[[], object]
TARGETS = [0.03, 0.05, 0.07, 0.09, 0.12, 0.15, 0.18, 0.21]


def main(*, rounds: int = 5) -> None:
    """Measure each size ROUNDS times, in turns, and write the page."""
    torch.set_num_threads(1)
    kinds = {"batch, digits": batches, "images of 32x32": images, "files": files, "parameters": parameters}
    with TemporaryDirectory(prefix="edm2-growth-") as folder:
        rows = [row for name, kind in kinds.items() for row in _rows(name, kind(Path(folder)), rounds)]
    text = PAGE.format(machine=machine(), torch=torch.__version__, rounds=rounds, rows="\n".join(rows))
    print(text)
    (ROOT / "docs" / "growth.md").write_text(text, encoding="utf-8")


def _rows(name: str, work: Mapping[int, Mapping[str, tuple[Work, bool]]], rounds: int) -> Iterator[str]:
    """A row for each kind of work; of those that should not grow, the ratio is of the whole."""
    sizes = list(work)
    for what, (_, grows) in work[sizes[0]].items():
        seconds = dict.fromkeys(sizes, float("inf"))
        for _ in range(rounds):
            for size in sizes:
                seconds[size] = min(seconds[size], _seconds(work[size][what][0]))
        least = seconds[sizes[0]]
        ratios = [seconds[size] / least / (size / sizes[0] if grows else 1) for size in sizes]
        cells = [f"{seconds[size] * 1e3:.1f} ms" for size in sizes] + [f"{ratio:.2f}" for ratio in ratios[1:]]
        yield f"| {name} | {what} | {' | '.join(f'{_short(size)}' for size in sizes)} | {' | '.join(cells)} |"


def _seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


