"""Whether cost grows linearly: CPU seconds at three sizes each, per unit beside the smallest; writes docs/growth.md.

    python -m benchmarks.growth [--rounds 5]

CPU seconds of this process, since other work on the machine does not count in them; medians.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
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
from benchmarks.rounds import in_turns
from edm2_core.ema import Length
from edm2_core.network import initialize
from edm2_core.presets import PRESETS

Work = dict[str, Callable[[], object]]
DIGITS, FLAT = PRESETS["digits"].network, "a batch of 256"  # costs the same from any dataset


def main(*, rounds: int = 5) -> None:
    """Measure each size ROUNDS times, in turns, and write the page."""
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="edm2-growth-") as folder:
        made = [(name, {n: make(Path(folder), n) for n in sizes}) for name, (make, sizes) in KINDS.items()]
        rows = [row for name, work in made for row in _rows(name, work, rounds)]
    text = PAGE.format(machine=machine(), torch=torch.__version__, rounds=rounds, rows="\n".join(rows))
    print(text)
    (ROOT / "docs" / "growth.md").write_text(text, encoding="utf-8")


def _rows(name: str, work: dict[int, Work], rounds: int) -> Iterator[str]:
    first, *others = work
    for what in work[first]:
        times = in_turns({str(n): each[what] for n, each in work.items()}, rounds=rounds, clock=time.process_time)
        seconds = dict(zip(work, times.values(), strict=True))
        ratios = [seconds[n] / seconds[first] / (1 if what == FLAT else n / first) for n in others]
        cells = [f"{n:,}: {1e3 * each:.1f} ms" for n, each in seconds.items()] + [f"{ratio:.2f}" for ratio in ratios]
        yield f"| {name} | {what} | {' | '.join(cells)} |"


def batches(folder: Path, size: int) -> Work:
    learner = Learner(build(DIGITS, initialize(DIGITS, seed=0)))
    x, noise = torch.randn((2, size, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    batch = Batch(x, noise, torch.ones(size, 1, 1, 1), torch.eye(10)[torch.arange(size) % 10])
    return {"a step": partial(learner.step, batch, lr=0.01)}


def images(folder: Path, count: int) -> Work:
    rng, path = np.random.default_rng(0), folder / f"{count}.zip"
    with ZipFile(path, "w") as file:
        for i in range(count):
            with file.open(f"{i:08d}.png", "w") as png:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(png, format="PNG")
    reading = Reading(open_dataset(path), seed=0)
    return {"opening": partial(open_dataset, path), FLAT: lambda: reading(count // 2, 256)}


def files(folder: Path, count: int) -> Work:
    at, rng = folder / f"snapshots{count}", np.random.default_rng(0)
    params = {"w": rng.standard_normal((1024, 1024), np.float32)}
    for i in range(count):
        nimg, length = (i // 2 + 1) * 1000, Length.of(LENGTHS[i % 2])
        save_snapshot(at / tracked_name(nimg, length), Snapshot(params=params, config=None, nimg=nimg, length=length))

    def work(*sigma_rels: float) -> object:
        return reconstruct(open_sources(at), sigma_rels=sigma_rels)

    return {"one length": partial(work, 0.03), "eight lengths": partial(work, *np.geomspace(0.03, 0.2, 8))}


def parameters(folder: Path, count: int) -> Work:
    width = round((count / 32) ** 0.5)
    learner = Learner(Denoiser(torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(32)))))
    return {
        "update of two averages": lambda: learner.ema.update(time=learner.nimg + 1, delta=1),
        "saving a state": partial(save_state, folder / "state.safetensors", learner.state()),
        "saving two snapshots": partial(learner.ema.save, folder / "saved"),
    }


KINDS = {
    "images in a batch of digits": (batches, (64, 128, 256)),
    "images of 32x32 in a .zip": (images, (2_000, 8_000, 32_000)),
    "snapshots of 1 M parameters": (files, (16, 32, 64)),
    "parameters": (parameters, (2_000_000, 8_000_000, 32_000_000)),
}
PAGE = """# Does cost grow linearly?

`python -m benchmarks.growth` on {machine}, PyTorch {torch},
one thread: CPU seconds of the process, medians of {rounds} rounds, which alternate between the sizes. A ratio is that
to the smallest size, per image, file or parameter: 1 is linear, less is better than linear. A batch of 256 should cost
the same from any dataset: its ratio is of the whole.

| what grows | cost | smallest | middle | largest | ratio, middle | ratio, largest |
|---|---|---|---|---|---|---|
{rows}
"""

if __name__ == "__main__":
    tyro.cli(main)
