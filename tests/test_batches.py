"""The order of samples is a pure function of (seed, images seen)."""

import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_files import write
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_port import ToySampler, ToyTrainer, run_toy

from backends.pipeline.data.batches import Batches, Reading, label_rows, label_uniforms, prepared, sample_indices
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.folder import Run
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError

PINNED = [3, 0, 2, 4, 8, 7, 6, 9, 5, 0]
UNIFORM = [0.7948388310120027, 0.9517635360793124, 0.005134536026104364, 0.05463488965959018, 0.8549525795211378]
sizes = st.integers(1, 20)
seeds = st.integers(0, 5)


class Numbered:
    """Image i is filled with i; from ``broken`` on, none can be read."""

    name = spec = "numbered"
    shape, format, vectors, cond_channels = (3, 2, 2), DataFormat(), False, 0

    def __init__(self, size: int = 10, *, label_dim: int = 0, broken: int | None = None) -> None:
        self.label_dim = label_dim
        self._size, self._broken, self._reads = size, broken, 0

    def __len__(self) -> int:
        return self._size

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        if self._reads == self._broken:
            raise InputError("image.png is broken")
        self._reads += 1
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 3, 2, 2))

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        return indices % self.label_dim

    def condition(self, indices: np.ndarray, /) -> np.ndarray:
        raise NotImplementedError


def _numbers(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 50), st.integers(1, 70))
def test_indices_depend_on_position_alone(size: int, seed: int, start: int, count: int) -> None:
    whole = sample_indices(start=0, count=start + count, size=size, seed=seed)
    part = sample_indices(start=start, count=count, size=size, seed=seed)
    assert part.dtype == np.int64
    assert part.shape == (count,)
    np.testing.assert_array_equal(part, whole[start:])


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 5))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    indices = sample_indices(start=epoch * size, count=size, size=size, seed=seed)
    assert sorted(indices.tolist()) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        sample_indices(start=epoch * 20, count=20, size=20, seed=seed).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6


def test_every_place_of_an_epoch_is_any_sample_equally_often() -> None:
    orders = np.array([sample_indices(start=0, count=5, size=5, seed=seed) for seed in range(2000)])
    for place in range(5):  # standard deviation: (2000 * 0.2 * 0.8) ** 0.5
        assert np.abs(np.bincount(orders[:, place], minlength=5) - 400).max() < 5 * 320**0.5


def test_the_order_is_the_same_as_ever() -> None:
    """Pinned: a change here means that a run started earlier does not resume exactly."""
    assert sample_indices(start=7, count=10, size=10, seed=3).tolist() == PINNED


@pytest.mark.parametrize("prefetch", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3, 8, 25])
def test_the_stream_of_images_is_the_same_for_every_batch_size_and_prefetch_depth(batch: int, prefetch: int) -> None:
    with Batches(Reading(Numbered(), 1), start=4, batch=batch, prefetch=prefetch) as batches:
        stream = [n for images, *_ in islice(batches, -(-60 // batch)) for n in _numbers(images)]
    assert stream[:60] == sample_indices(start=4, count=60, size=10, seed=1).tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_processes_make_the_batch(world: int) -> None:
    count = 8 // world
    parts = [
        Batches(Reading(Numbered(), 2), start=16, batch=8, offset=rank * count, count=count) for rank in range(world)
    ]
    for step in range(3):
        stream = [n for part in parts for n in _numbers(next(part)[0])]
        assert stream == sample_indices(start=16 + 8 * step, count=8, size=10, seed=2).tolist()
    for part in parts:
        part.close()


def test_going_on_from_the_images_seen_repeats_and_skips_nothing() -> None:
    with Batches(Reading(Numbered(), 0), start=0, batch=4) as batches:
        whole = [_numbers(images) for images, *_ in islice(batches, 6)]
    with Batches(Reading(Numbered(), 0), start=12, batch=4) as batches:
        assert [_numbers(images) for images, *_ in islice(batches, 3)] == whole[3:]


def test_images_and_labels_are_those_of_the_dataset() -> None:
    digits = open_dataset("digits")
    indices = sample_indices(start=1790, count=32, size=1797, seed=0)
    with Batches(Reading(digits, 0), start=1790, batch=32) as batches:
        batch = next(batches)
    assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(batch.images, digits.read(indices))
    np.testing.assert_array_equal(batch.labels, digits.labels(indices))
    images, rows, _ = prepared(batch, digits.format, label_dim=10)
    np.testing.assert_allclose(images, batch.images / 127.5 - 1, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(rows, np.eye(10, dtype=np.float32)[batch.labels])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("batch", [2, 8])
def test_dropped_labels_are_zero_rows_by_position_alone(batch: int, world: int) -> None:
    share, rows, seen = batch // world, [], []
    parts = [{"offset": rank * share, "count": share} for rank in range(world)]
    reading = Reading(Numbered(label_dim=3), 1, label_dropout=0.3)
    readers = [Batches(reading, start=4, batch=batch, **p) for p in parts]
    for _ in range(400 // batch):
        for reader in readers:
            batch_of_reader = next(reader)
            seen += _numbers(batch_of_reader.images)
            rows += label_rows(batch_of_reader.labels, 3).tolist()
    for reader in readers:
        reader.close()
    dropped = label_uniforms(start=4, count=400, size=10, seed=1) < 0.3
    assert abs(dropped.sum() - 120) < 5 * (400 * 0.3 * 0.7) ** 0.5
    for number, row, drop in zip(seen, rows, dropped, strict=True):
        assert row == ([0, 0, 0] if drop else np.eye(3)[number % 3].tolist())
    assert len({tuple(dropped[i : i + 10]) for i in range(6, 396, 10)}) > 20  # epochs differ


def test_which_labels_are_dropped_is_the_same_as_ever() -> None:
    """Pinned: a change here means that a run started earlier does not resume exactly."""
    drawn = label_uniforms(start=7, count=5, size=10, seed=3)
    assert drawn.tolist() == UNIFORM


def test_without_labels_there_are_none() -> None:
    with Batches(Reading(Numbered(), 0), start=0, batch=4) as batches:
        assert next(batches)[1] is None


def test_an_error_of_the_thread_is_raised_where_its_batch_is_taken_and_ends_the_iteration() -> None:
    batches = Batches(Reading(Numbered(broken=2), 0), start=0, batch=4, prefetch=4)
    next(batches)
    next(batches)
    with pytest.raises(InputError, match=r"^image\.png is broken$"):
        next(batches)
    assert list(batches) == []


def test_closing_ends_the_thread_and_the_iteration() -> None:
    before = threading.active_count()
    batches = Batches(Reading(Numbered(), 0), start=0, batch=4)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert list(batches) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_whoever_reads_it(workers: int) -> None:
    reading = Reading(open_dataset("digits"), 3, label_dropout=0.2, flip=True)
    with Batches(reading, start=5, batch=600, offset=100, count=300, workers=workers) as batches:
        got = [next(batches) for _ in range(3)]
    for step, batch in enumerate(got):
        for one, other in zip(batch, reading(105 + 600 * step, 300), strict=True):
            assert (one is other is None) or np.array_equal(one, other)


def test_workers_end_with_the_process_that_they_serve() -> None:
    """Also where that is killed, and cannot tell them."""
    code = (
        "import multiprocessing, time\n"
        "from backends.pipeline.data.batches import Batches, Reading\n"
        "from backends.pipeline.data.datasets import open_dataset\n"
        "if __name__ == '__main__':\n"
        "    batches = Batches(Reading(open_dataset('digits'), 0), start=0, batch=8, workers=1)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(code, encoding="utf-8")
        process = subprocess.Popen([sys.executable, "script.py"], cwd=folder, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        worker = Path("/proc", process.stdout.readline().strip())
        if not worker.exists():
            pytest.skip("no /proc to see processes in")
        process.kill()
        process.stdout.close()
        process.wait()
        end = time.monotonic() + 30
        while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2]:
            assert time.monotonic() < end, "the worker lives on"
            time.sleep(0.1)


def test_mirrored_images_are_half_of_them_by_position_alone() -> None:
    digits = open_dataset("digits")
    reading = Reading(digits, 0, flip=True)
    batch, later = reading(0, 1797), reading(1797, 1797)
    assert abs(batch.flipped.sum() - 1797 / 2) < 5 * (1797 / 4) ** 0.5
    assert not np.array_equal(batch.flipped, later.flipped)
    np.testing.assert_array_equal(np.concatenate([reading(3, 5).flipped, reading(8, 9).flipped]), batch.flipped[3:17])
    images, _, _ = prepared(batch, digits.format, label_dim=10)
    plain, _, _ = prepared(batch._replace(flipped=None), digits.format, label_dim=10)
    for image, whole, mirrored in zip(images, plain, batch.flipped, strict=True):
        np.testing.assert_array_equal(image, whole[..., ::-1] if mirrored else whole)


class Damaged(Numbered):
    """Images 3, 4 and 9 of 10 cannot be read."""

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        if bad := {3, 4, 9} & set(indices.tolist()):
            raise InputError(f"{min(bad)}.png is broken")
        return super().read(indices)


@pytest.mark.parametrize("parts", [(30,), (7, 16, 7)], ids=str)
def test_the_next_sample_takes_the_place_of_a_broken_one_with_its_label(
    parts: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    data = Damaged(label_dim=10)
    whole, start, got = sample_indices(start=0, count=30, size=10, seed=0), 0, []
    for count in parts:
        batch = Reading(data, 0, skip_broken=True)(start, count)
        start += count
        assert _numbers(batch.images) == batch.labels.tolist()
        got += _numbers(batch.images)
    assert got == [{3: 5, 4: 5, 9: 0}.get(i, i) for i in whole.tolist()]
    with pytest.raises(InputError, match="is broken"):
        Reading(data, 0)(0, 30)


def test_a_folder_with_a_broken_image_is_trained_on_where_that_is_asked_for(
    tmp_path: Path, toy: None, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(70):
        write(tmp_path / "data" / f"{i:02d}.png", mode="L", seed=i)
    broken = tmp_path / "data" / "41.png"
    options = {"preset": "toy", "data": tmp_path / "data", "unconditional": True, "outdir": "run", "no_picture": True}

    class Breaking(ToyTrainer):
        def step(self, *args, lr):
            super().step(*args, lr=lr)
            if self.nimg == 512:
                broken.write_bytes(broken.read_bytes()[:60])

    with pytest.raises(InputError, match=r"41\.png"):
        run_toy(Breaking, ToySampler(), duration=2048, **options)
    assert Run("run").state_nimg() >= 512
    assert run_toy(ToyTrainer, ToySampler(), outdir="run", skip_broken=True, no_picture=True) == 0
    assert Run("run").state_nimg() == 2048
    assert len([record for record in caplog.records if "skipped: " in record.message]) == 1
    assert Run("run").log()[-1]["skipped"] > 0
