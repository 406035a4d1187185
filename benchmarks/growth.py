"""Whether cost grows linearly: CPU seconds at three sizes each, per unit beside the smallest; writes docs/growth.md.

    python -m benchmarks.growth [--rounds 5]

CPU seconds of this process, since other work on the machine does not count in them; the least of the rounds.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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
from backends.torch.step import Batch, Learner
from backends.torch.weights import build
from benchmarks.ema_reconstruct import LENGTHS, ROOT, machine
from edm2_core.ema import Length
from edm2_core.network import initialize
from edm2_core.presets import PRESETS

Work = Callable[[], object]
Cases = dict[int, dict[str, tuple[Work, bool]]]
"""By size: what is done, and whether that should grow with the size."""
TARGETS = {"one length": [0.03], "eight lengths": [0.03, 0.06, 0.07, 0.09, 0.12, 0.15, 0.18, 0.21]}


def main(*, rounds: int = 5) -> None:
    """Measure each size ROUNDS times, in turns, and write the page."""
    torch.set_num_threads(1)
    kinds = {"batch, digits": batches, "images of 32x32": images, "files": files, "parameters": parameters}
    with TemporaryDirectory(prefix="edm2-growth-") as folder:
        rows = [row for name, kind in kinds.items() for row in _rows(name, kind(Path(folder)), rounds)]
    text = PAGE.format(machine=machine(), torch=torch.__version__, rounds=rounds, rows="\n".join(rows))
    print(text)
    (ROOT / "docs" / "growth.md").write_text(text, encoding="utf-8")


def _rows(name: str, work: Cases, rounds: int) -> Iterator[str]:
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


def batches(folder: Path) -> Cases:
    """Steps of the digits' network."""
    work: Cases = {}
    config = PRESETS["digits"].network
    for size in (64, 128, 256):
        learner = Learner(build(config, initialize(config, seed=0)))
        rng = torch.Generator().manual_seed(0)
        x, noise = (torch.randn((size, 1, 8, 8), generator=rng) for _ in range(2))
        batch = Batch(x, noise, torch.ones(size, 1, 1, 1), torch.eye(10)[torch.arange(size) % 10])
        work[size] = {"a step": (partial(learner.step, batch, lr=0.01), True)}
    return work


def images(folder: Path) -> Cases:
    """Datasets of random PNG in a .zip; a batch has the same size in all."""
    work: Cases = {}
    rng = np.random.default_rng(0)
    for count in (2_000, 8_000, 32_000):
        path = folder / f"{count}.zip"
        with ZipFile(path, "w") as file:
            for i in range(count):
                content = BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, format="PNG")
                file.writestr(f"{i:08d}.png", content.getvalue())
        reading = Reading(open_dataset(path), seed=0)
        work[count] = {
            "opening": (partial(open_dataset, path), True),
            "a batch of 256": (partial(reading, count // 2, 256), False),
        }
    return work


def files(folder: Path) -> Cases:
    """Reconstruction from snapshots of 1M parameters, of two lengths in turns."""
    work: Cases = {}
    params = {f"w{i}": np.random.default_rng(i).standard_normal((256, 1024), np.float32) for i in range(4)}
    for count in (16, 32, 64):
        at = folder / f"snapshots{count}"
        for i in range(count):
            time, length = (i // 2 + 1) * 1000, Length.of(LENGTHS[i % 2])
            save_snapshot(
                at / tracked_name(time, length), Snapshot(params=params, config=None, nimg=time, length=length)
            )
        work[count] = {name: (partial(_reconstructed, at, targets), True) for name, targets in TARGETS.items()}
    return work


def parameters(folder: Path) -> Cases:
    """A denoiser whose backbone has 32 layers."""
    work: Cases = {}
    for millions in (2, 8, 32):
        width = 256 * round((millions / 2) ** 0.5)
        learner = Learner(Denoiser(torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(32)))))
        clock = itertools.count(1)
        state = learner.state()
        work[millions * 1_000_000] = {
            "update of two averages": (lambda ema=learner.ema, c=clock: ema.update(time=next(c), delta=1), True),
            "saving a state": (partial(save_state, folder / "state.safetensors", state), True),
            "saving two snapshots": (partial(learner.ema.save, folder / "saved"), True),
        }
    return work


def _reconstructed(folder: Path, targets: Sequence[float]) -> object:
    return reconstruct(open_sources(folder), sigma_rels=targets)


def _short(size: int) -> str:
    return f"{size // 1_000_000} M" if size >= 1_000_000 else f"{size:,}"


PAGE = """# Does cost grow linearly?

`python -m benchmarks.growth` on {machine}, PyTorch {torch},
one thread: CPU seconds of the process, the least of {rounds} rounds, which alternate between the sizes. A ratio is that
to the smallest size, per image, file or parameter: 1 is linear, less is better than linear. A batch of 256 should cost
the same from any dataset: its ratio is of the whole.

| what grows | cost | sizes | | | smallest | middle | largest | ratio, middle | ratio, largest |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    tyro.cli(main)
