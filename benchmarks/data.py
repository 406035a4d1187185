"""How fast batches come: images a second for each kind of data, beside Pillow alone, and the time to open a dataset.

    python -m benchmarks.data --images 20000

Writes docs/benchmark_data.md. Each figure is the median of ``--rounds`` runs in processes of their own.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import tyro
from PIL import Image, ImageOps

from backends.pipeline.data.batches import Batch, Batches, Reading
from backends.pipeline.data.convert import convert, open_source
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.data.files import Zip
from backends.pipeline.data.transforms import Settings

BATCH = 256
SMALL = Settings(size=(64, 64), transform="center-crop")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    images: int = 20_000
    """PNG of 64x64 in the .zip and in the folder."""
    latents: int = 2_000
    """Latents of 64x64x4, as moments."""
    photographs: int = 3_000
    """JPEG of 512x384 that are converted to 64x64."""
    seconds: float = 4.0
    """Time to read for."""
    rounds: int = 3
    """Repetitions."""
    out: Path = Path("docs/benchmark_data.md")
    """Page to write."""


def make(folder: Path, options: Options) -> None:
    """Smooth random pictures with some noise, which compress as photographs do."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    with ZipFile(folder / "images.zip", "w", ZIP_STORED) as file:
        for i in range(options.images):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
                (64, 64), Image.Resampling.BICUBIC
            )
            pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-6, 7, (64, 64, 3))
            content = BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, format="PNG")
            file.writestr(f"{i // 1000:05d}/img{i:08d}.png", content.getvalue())
            (folder / "images" / f"{i:08d}.png").write_bytes(content.getvalue())
    with ZipFile(folder / "latents.zip", "w", ZIP_STORED) as file:
        for i in range(options.latents):
            content = BytesIO()
            np.save(content, rng.random((8, 64, 64), dtype=np.float32))
            file.writestr(f"{i // 1000:05d}/img-mean-std-{i:08d}.npy", content.getvalue())


def rate(path: str, workers: int, seconds: float) -> float:
    """Images a second out of :class:`Batches`, after the first batches."""
    reading = Reading(open_dataset(path), seed=0)
    batches: Batches[Batch] = Batches(reading, start=0, batch=BATCH, workers=workers, prefetch=4)
    with batches:
        for _ in range(4):
            next(batches)
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            count += len(next(batches).images)
    return count / passed


def pillow(path: str, workers: int, seconds: float) -> float:
    """Images a second that Pillow alone decodes, of contents in memory."""
    files = Zip(Path(path))
    contents = [bytes(files.read(i)) for i in range(min(2000, len(files.names)))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_decode, [contents[:8]] * workers, [0.01] * workers))
        return sum(pool.map(_decode, [contents] * workers, [seconds] * workers))


def _decode(contents: list[bytes], seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        with Image.open(BytesIO(contents[count % len(contents)])) as image:
            np.asarray(image)
        count += 1
    return count / passed


def make_photographs(folder: Path, count: int) -> Path:
    """JPEG of 512x384, as convert finds them."""
    rng, photographs = np.random.default_rng(1), folder / "photographs"
    photographs.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(photographs / f"{i:06d}.jpg", quality=90)
    return photographs


def converting(photographs: Path, workers: int) -> float:
    """Images a second of edm2 dataset convert, start of its processes included."""
    source, start = open_source(photographs), time.perf_counter()
    with TemporaryDirectory() as out:
        convert(source, Path(out, "data.zip"), SMALL, workers=workers)
    return len(source.indices) / (time.perf_counter() - start)


def resizing(photographs: Path, workers: int, seconds: float) -> float:
    """Images a second that Pillow alone decodes, cuts, resizes and encodes, of contents in memory."""
    contents = [path.read_bytes() for path in sorted(photographs.iterdir())[:200]]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_resize, [contents[:8]] * workers, [0.01] * workers))
        return sum(pool.map(_resize, [contents] * workers, [seconds] * workers))


def _resize(contents: list[bytes], seconds: float) -> float:
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        with Image.open(BytesIO(contents[count % len(contents)])) as image, BytesIO() as out:
            made = ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)
            made.save(out, format="PNG", compress_level=0)
        count += 1
    return count / passed


def opening(path: str) -> tuple[float, float]:
    """Seconds to open, and the memory of the process in MB, in a process of its own."""
    code = (
        "import time, sys; from backends.pipeline.data.datasets import open_dataset\n"
        "s = time.perf_counter(); d = open_dataset(sys.argv[1]); t = time.perf_counter() - s\n"
        "print(t, next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def median(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def main(options: Options) -> None:
    cores = os.cpu_count() or 1
    lines = [
        "# How fast batches come", "",
        f"`python -m benchmarks.data`: {options.images} PNG of 64x64 and {options.latents} latents of 64x64x4 stored",
        f"as moments, in batches of {BATCH}, on {cores} cores; medians of {options.rounds} runs.",
        "", "| data | workers | images/s | of Pillow alone on as many cores (threads: on two) |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    with TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options)
        packed, seconds, rounds = str(folder / "images.zip"), options.seconds, options.rounds
        alone = {w: median(partial(pillow, packed, w, seconds), rounds) for w in (1, 2)}
        for kind in ("images.zip", "images", "latents.zip"):
            for workers in (0, 1, 2):
                got = median(partial(rate, str(folder / kind), workers, seconds), rounds)
                ratio = "" if kind == "latents.zip" else f"{got / alone[workers or 2]:.0%}"
                what = f"{workers}" if workers else "threads"
                lines.append(f"| {kind} | {what} | {got:,.0f} | {ratio} |")
                print(lines[-1], flush=True)
        photographs = make_photographs(folder, options.photographs)
        lines += [
            "",
            "| `edm2 dataset convert`, workers | images/s | of Pillow alone on as many cores |",
            "| --- | --- | --- |",
        ]
        for workers in (1, 2):
            got = median(partial(converting, photographs, workers), rounds)
            own = median(partial(resizing, photographs, workers, seconds), rounds)
            lines.append(f"| {workers} | {got:,.0f} | {got / own:.0%} |")
            print(lines[-1], flush=True)
        lines += ["", "| opening | seconds | MB in all |", "| --- | --- | --- |"]
        for kind in ("images.zip", "images", "latents.zip"):
            pairs = [opening(str(folder / kind)) for _ in range(options.rounds)]
            took, memory = (statistics.median(column) for column in zip(*pairs, strict=True))
            lines.append(f"| {kind} | {took:.2f} | {memory:.0f} |")
            print(lines[-1], flush=True)
    lines += [
        "", "An H100 is expected to train S on about 650 latents a second, so eight need about 5,200; pixels of 64x64",
        "as many. Give `--workers` as many processes as it takes to decode that many images.",
    ]  # fmt: skip
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
