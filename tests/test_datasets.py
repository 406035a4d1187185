"""A dataset gives the pixels and labels of its files, or says in one line which file is wrong."""

import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backends.pipeline.data.datasets import Dataset, open_dataset, to_model, to_uint8
from edm2_core.errors import InputError

Pack = Callable[[Path], Path]


def _as_folder(folder: Path) -> Path:
    return folder


def _as_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder.parent / "packed"), "zip", folder))


@pytest.fixture(params=[_as_folder, _as_zip], ids=["folder", "zip"])
def pack(request: pytest.FixtureRequest) -> Pack:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def _write(path: Path, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Writes random pixels and returns them as [H, W] or [H, W, C]."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = (
        np.random.default_rng(seed)
        .integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
        .squeeze(2 if bands == 1 else ())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes(mode, size, pixels.tobytes()).save(path)
    return pixels


def _label(folder: Path, content: Any) -> None:
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))


def _all(dataset: Dataset) -> np.ndarray:
    return dataset.images(np.arange(len(dataset)))


def _refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_dataset(str(path))
    assert "\n" not in str(caught.value)


def test_the_digits_are_those_of_scikit_learn() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    digits = open_dataset("digits")
    assert (digits.name, digits.resolution, digits.channels, digits.label_dim, len(digits)) == (
        "digits",
        8,
        1,
        10,
        1797,
    )
    images, labels = _all(digits), digits.labels(np.arange(1797))
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images[:, 0], np.floor(source.images * 255 / 16 + 0.5))
    np.testing.assert_array_equal(labels, source.target)
    assert images.max() == 255


def test_every_uint8_survives_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    model = to_model(pixels)
    assert model.dtype == np.float32
    assert (model.min(), model.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(model), pixels)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_beyond_the_range_are_clipped_and_those_not_finite_are_0(dtype: type) -> None:
    values = np.array([-2, 2, -65504, 65504, np.nan, np.inf, -np.inf, 0.999, 0], dtype)
    assert to_uint8(values).tolist() == [0, 255, 0, 255, 0, 0, 0, 255, 128]
    assert to_uint8(np.array([1e38], np.float32)).tolist() == [255]


def test_images_come_from_any_depth_ordered_by_name(folder: Path, pack: Pack) -> None:
    pixels = {name: _write(folder / name, seed=i) for i, name in enumerate(["b/2.png", "a.PNG", "b/10.bmp"])}
    (folder / "notes.txt").write_text("no image")
    dataset = open_dataset(str(pack(folder)))
    assert (dataset.resolution, dataset.channels, dataset.label_dim, len(dataset)) == (8, 3, 0, 3)
    images = dataset.images(np.array([2, 0, 1, 0]))
    assert images.dtype == np.uint8
    order = ["b/2.png", "a.PNG", "b/10.bmp", "a.PNG"]
    np.testing.assert_array_equal(images, np.stack([pixels[name].transpose(2, 0, 1) for name in order]))
    assert dataset.images(np.empty(0, np.int64)).shape == (0, 3, 8, 8)


def test_a_dataset_is_called_as_its_folder_or_zip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(folder / "1.png")
    monkeypatch.chdir(folder)
    assert open_dataset(".").name == "data"
    assert open_dataset(str(_as_zip(folder))).name == "packed"


def test_hidden_files_are_left_out(folder: Path, pack: Pack) -> None:
    _write(folder / "1.png")
    for name in ("._1.png", ".trash/2.png", "__MACOSX/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert len(open_dataset(str(pack(folder)))) == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_grey_stays_one_channel_and_all_else_becomes_rgb_without_alpha(folder: Path, mode: str) -> None:
    if mode == "P":
        colours = _write(folder / "1.png", mode="RGB")
        with Image.open(folder / "1.png") as image:
            paletted = image.quantize(64)  # 64 pixels, so none changes
        paletted.save(folder / "1.png", transparency=bytes([0, 128]))
        expected = colours.transpose(2, 0, 1)
    elif mode == "1":
        Image.frombytes("1", (8, 8), bytes([0b10000001] * 8)).save(folder / "1.png")
        expected = np.tile(np.array([255, 0, 0, 0, 0, 0, 0, 255]), (1, 8, 1))
    else:
        pixels = _write(folder / "1.png", mode=mode).reshape(8, 8, -1)
        expected = pixels[..., : 3 if mode.startswith("RGB") else 1].transpose(2, 0, 1)
    dataset = open_dataset(str(folder))
    assert dataset.channels == len(expected)
    np.testing.assert_array_equal(_all(dataset)[0], expected)


def test_opening_reads_no_pixels(folder: Path, pack: Pack) -> None:
    _write(folder / "1.png", size=(64, 64))
    _write(folder / "2.png", size=(64, 64))
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    dataset = open_dataset(str(pack(folder)))
    dataset.images(np.array([0]))
    with pytest.raises(InputError, match=r"^data must be readable, got '.*truncated.*' from .*2\.png: ") as caught:
        dataset.images(np.array([0, 1]))
    assert "\n" not in str(caught.value)


def test_threads_may_share_a_dataset(folder: Path, pack: Pack) -> None:
    for i in range(20):
        _write(folder / f"{i:02d}.png", size=(32, 32), seed=i)
    dataset = open_dataset(str(pack(folder)))
    whole = _all(dataset)
    orders = [np.random.default_rng(i).permutation(20) for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        for order, images in zip(orders, threads.map(dataset.images, orders), strict=True):
            np.testing.assert_array_equal(images, whole[order])


def test_only_one_thread_at_a_time_has_a_member_of_a_zip_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZipFile counts open members without a lock: a lost count would close the file under another thread."""
    for i in range(8):
        _write(folder / f"{i}.png", seed=i)
    dataset = open_dataset(str(_as_zip(folder)))
    open_member, inside = zipfile.ZipFile.open, threading.Semaphore(1)

    def slow_open(*args: Any) -> Any:
        assert inside.acquire(blocking=False)
        time.sleep(0.005)
        inside.release()
        return open_member(*args)

    monkeypatch.setattr(zipfile.ZipFile, "open", slow_open)
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(lambda i: dataset.images(np.array([i])), range(8)))) == 8


def test_labels_follow_the_files(folder: Path, pack: Pack) -> None:
    for name in ("a.png", "cat/b.png", "c.png"):
        _write(folder / name)
    _label(folder, {"labels": [["c.png", 0], ["cat/b.png", 6], ["gone.png", 99], ["a.png", 2]]})
    dataset = open_dataset(str(pack(folder)))
    assert dataset.label_dim == 7
    labels = dataset.labels(np.array([2, 0, 2]))  # a, c, cat/b
    assert labels.dtype == np.int64
    assert labels.tolist() == [6, 2, 6]


def test_null_labels_are_none(folder: Path, pack: Pack) -> None:
    _write(folder / "a.png")
    _label(folder, {"labels": None})
    dataset = open_dataset(str(pack(folder)))
    assert dataset.label_dim == 0
    with pytest.raises(InputError, match=r"^labels must be in dataset\.json, .* has none: "):
        dataset.labels(np.array([0]))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting"),
        ("\udcff", "utf-8"),
        ([], "no 'labels'"),
        ({"label": []}, "no 'labels'"),
        ({"labels": {"a.png": 0}}, "dict as labels"),
        ({"labels": []}, r"no label for a\.png"),
        ({"labels": [["b.png", 0]]}, r"no label for a\.png"),
        ({"labels": [["a.png"]]}, r"\['a\.png'\]"),
        ({"labels": [["a.png", -1]]}, r"\['a\.png', -1\]"),
        ({"labels": [["a.png", 1.0]]}, r"\['a\.png', 1\.0\]"),
        ({"labels": [["a.png", True]]}, r"\['a\.png', True\]"),
        ({"labels": [["a.png", "1"]]}, r"\['a\.png', '1'\]"),
        ({"labels": [["a.png", 10**20]]}, r"\['a\.png', 1000"),
        ({"labels": [["a.png", [1]]]}, r"\['a\.png', \[1\]\]"),
        ({"labels": [["a.png", 1], ["a.png", 2]]}, r"both 1 and 2 for a\.png"),
    ],
    ids=str,
)
def test_a_malformed_table_of_labels_is_refused(folder: Path, content: Any, fault: str) -> None:
    _write(folder / "a.png")
    if isinstance(content, str):
        (folder / "dataset.json").write_bytes(content.encode(errors="surrogateescape"))
    else:
        _label(folder, content)
    _refused(folder, rf"dataset\.json must be .*, got .*{fault}.*: correct the file, or remove it")


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    _refused(
        tmp_path / "gone", "^data must be 'digits', a folder or a .zip of images, got '.*gone', which does not exist: "
    )
    _refused(tmp_path / "gone.zip", "which does not exist")
    (tmp_path / "file.tar").write_bytes(b"")
    _refused(tmp_path / "file.tar", "which is none of these")


def test_data_without_images_is_refused(folder: Path, pack: Pack) -> None:
    (folder / "notes.txt").write_text("no image")
    path = pack(folder)
    _refused(path, rf"^data must hold images \(\.png .*\), got none in {path}: ")


def test_images_of_two_sizes_are_refused_and_both_named(folder: Path, pack: Pack) -> None:
    _write(folder / "1.png")
    _write(folder / "2.png", size=(16, 16))
    _refused(pack(folder), r"^images must have one size, got .*1\.png of 8x8 and .*2\.png of 16x16: ")


def test_grey_among_colour_is_refused_and_both_named(folder: Path, pack: Pack) -> None:
    _write(folder / "1.png")
    _write(folder / "2.png", mode="L")
    _refused(pack(folder), r"all grey or all colour, got .*1\.png with 3 channels and .*2\.png with 1: ")


def test_images_that_are_not_square_are_refused(folder: Path, pack: Pack) -> None:
    _write(folder / "1.png", size=(8, 6))
    _refused(pack(folder), r"^images must be square, got .*1\.png of 8x6: ")


def test_more_than_8_bits_are_refused_instead_of_lost(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "1.png")
    _refused(folder, r"^images must have 8 bits per channel, got .*1\.png of mode I")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "signature alone"])
def test_a_file_that_is_no_image_is_refused_and_named(folder: Path, pack: Pack, content: bytes) -> None:
    _write(folder / "1.png")
    (folder / "2.png").write_bytes(content)
    _refused(pack(folder), r"^data must be readable, got 'not an image that Pillow can read' from .*2\.png: ")


def test_a_broken_zip_is_refused_and_named(folder: Path) -> None:
    _write(folder / "1.png")
    path = _as_zip(folder)
    path.write_bytes(path.read_bytes()[:-30])
    _refused(path, rf"^data must be readable, got 'File is not a zip file' from {path}: ")


def test_a_zip_with_a_damaged_member_names_it(folder: Path) -> None:
    path = folder / "data.zip"
    _write(folder / "1.png", size=(64, 64))
    with zipfile.ZipFile(path, "w") as file:
        file.write(folder / "1.png", "1.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    dataset = open_dataset(str(path))
    with pytest.raises(InputError, match=r"^data must be readable, got 'Bad CRC-32 .*' from .*data\.zip/1\.png: "):
        dataset.images(np.array([0]))


def test_a_file_that_changes_size_afterwards_is_refused(folder: Path) -> None:
    _write(folder / "1.png")
    dataset = open_dataset(str(folder))
    _write(folder / "1.png", size=(4, 4))
    with pytest.raises(InputError, match=r"1\.png changed: start again$"):
        dataset.images(np.array([0]))
