"""A dataset gives the pixels and labels of its files, or says in one line which file is wrong."""

import json
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import Pack, as_zip, refused, write
from PIL import Image

from backends.pipeline.data import images
from backends.pipeline.data.datasets import Dataset, open_dataset
from backends.pipeline.runs.pictures import visible
from edm2_core.codec import PIXELS, DataFormat
from edm2_core.errors import InputError


def _label(folder: Path, content: Any) -> None:
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))


def _all(dataset: Dataset) -> np.ndarray:
    return dataset.read(np.arange(len(dataset)))


def test_the_digits_are_those_of_scikit_learn() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    digits = open_dataset("digits")
    assert (digits.name, digits.shape, digits.label_dim, len(digits)) == ("digits", (1, 8, 8), 10, 1797)
    pixels, labels = _all(digits), digits.labels(np.arange(1797))
    assert pixels.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(pixels[:, 0], np.floor(source.images * 255 / 16 + 0.5))
    np.testing.assert_array_equal(labels, source.target)
    assert pixels.max() == 255


def test_every_uint8_survives_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    model = PIXELS.encode(pixels)
    assert model.dtype == np.float32
    assert (model.min(), model.max()) == (-1, 1)
    np.testing.assert_array_equal(visible(model, DataFormat()), pixels)


def test_values_beyond_the_range_are_clipped_and_those_not_finite_are_0() -> None:
    values = np.array([-2, 2, -65504, 65504, np.nan, np.inf, -np.inf, 0.999, 0, 1e38], np.float32)
    shown = visible(values.reshape(-1, 1, 1, 1), DataFormat())
    assert shown.ravel().tolist() == [0, 255, 0, 255, 0, 0, 0, 255, 128, 255]


def test_images_come_from_any_depth_ordered_by_name(folder: Path, pack: Pack) -> None:
    pixels = {name: write(folder / name, seed=i) for i, name in enumerate(["b/2.png", "a.PNG", "b/10.bmp"])}
    (folder / "notes.txt").write_text("no image")
    dataset = open_dataset(str(pack(folder)))
    assert (dataset.shape, dataset.label_dim, len(dataset)) == ((3, 8, 8), 0, 3)
    images = dataset.read(np.array([2, 0, 1, 0]))
    assert images.dtype == np.uint8
    order = ["b/2.png", "a.PNG", "b/10.bmp", "a.PNG"]
    np.testing.assert_array_equal(images, np.stack([pixels[name].transpose(2, 0, 1) for name in order]))
    assert dataset.read(np.empty(0, np.int64)).shape == (0, 3, 8, 8)


def test_a_dataset_is_called_as_its_folder_or_zip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "1.png")
    monkeypatch.chdir(folder)
    assert open_dataset(".").name == "data"
    assert open_dataset(str(as_zip(folder))).name == "packed"


def test_hidden_files_are_left_out(folder: Path, pack: Pack) -> None:
    write(folder / "1.png")
    for name in ("._1.png", ".trash/2.png", "__MACOSX/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert len(open_dataset(str(pack(folder)))) == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_grey_stays_one_channel_and_all_else_becomes_rgb_without_alpha(folder: Path, mode: str) -> None:
    if mode == "P":
        colours = write(folder / "1.png", mode="RGB")
        with Image.open(folder / "1.png") as image:
            paletted = image.quantize(64)  # 64 pixels, so none changes
        paletted.save(folder / "1.png", transparency=bytes([0, 128]))
        expected = colours.transpose(2, 0, 1)
    elif mode == "1":
        Image.frombytes("1", (8, 8), bytes([0b10000001] * 8)).save(folder / "1.png")
        expected = np.tile(np.array([255, 0, 0, 0, 0, 0, 0, 255]), (1, 8, 1))
    else:
        pixels = write(folder / "1.png", mode=mode).reshape(8, 8, -1)
        expected = pixels[..., : 3 if mode.startswith("RGB") else 1].transpose(2, 0, 1)
    dataset = open_dataset(str(folder))
    assert dataset.shape[0] == len(expected)
    np.testing.assert_array_equal(_all(dataset)[0], expected)


def test_opening_reads_no_pixels(folder: Path, pack: Pack) -> None:
    write(folder / "1.png", size=(64, 64))
    write(folder / "2.png", size=(64, 64))
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    dataset = open_dataset(str(pack(folder)))
    dataset.read(np.array([0]))
    with pytest.raises(
        InputError, match=r"got 1 of 2 that are not: .*2\.png cannot be read \(.*truncated.*\): "
    ) as caught:
        dataset.read(np.array([0, 1]))
    assert "\n" not in str(caught.value)


def test_threads_may_share_a_dataset(folder: Path, pack: Pack) -> None:
    for i in range(20):
        write(folder / f"{i:02d}.png", size=(32, 32), seed=i)
    dataset = open_dataset(str(pack(folder)))
    whole = _all(dataset)
    orders = [np.random.default_rng(i).permutation(20) for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        for order, images in zip(orders, threads.map(dataset.read, orders), strict=True):
            np.testing.assert_array_equal(images, whole[order])


def test_labels_follow_the_files(folder: Path, pack: Pack) -> None:
    for name in ("a.png", "cat/b.png", "c.png"):
        write(folder / name)
    _label(folder, {"labels": [["c.png", 0], ["cat/b.png", 6], ["gone.png", 99], ["a.png", 2]]})
    dataset = open_dataset(str(pack(folder)))
    assert dataset.label_dim == 7
    labels = dataset.labels(np.array([2, 0, 2]))  # a, c, cat/b
    assert labels.dtype == np.int64
    assert labels.tolist() == [6, 2, 6]


def test_null_labels_are_none(folder: Path, pack: Pack) -> None:
    write(folder / "a.png")
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
        ({"labels": [["a.png", [True]]]}, r"\['a\.png', \[True\]\]"),
        ({"labels": [["a.png", []]]}, r"\['a\.png', \[\]\]"),
        ({"labels": [["a.png", [float("nan")]]]}, r"\['a\.png', \[nan\]\]"),
        ({"labels": [["a.png", 1]], "classes": [1]}, "as classes"),
        ({"labels": [["a.png", 1], ["a.png", 2]]}, r"both 1 and 2 for a\.png"),
    ],
    ids=str,
)
def test_a_malformed_table_of_labels_is_refused(folder: Path, content: Any, fault: str) -> None:
    write(folder / "a.png")
    if isinstance(content, str):
        (folder / "dataset.json").write_bytes(content.encode(errors="surrogateescape"))
    else:
        _label(folder, content)
    refused(folder, rf"dataset\.json must be .*, got .*{fault}.*: correct the file, or remove it")


def test_a_table_of_labels_that_names_too_few_classes_is_refused(folder: Path) -> None:
    write(folder / "a.png")
    _label(folder, {"labels": [["a.png", 1]], "classes": ["one"]})
    refused(folder, "classes must be named all, got 1 names for 2 classes")


def test_vectors_are_labels_too(folder: Path, pack: Pack) -> None:
    for name in ("a.png", "b.png"):
        write(folder / name)
    _label(folder, {"labels": [["b.png", [0.5, 2, -1]], ["a.png", [1, 0, 3]]]})
    dataset = open_dataset(str(pack(folder)))
    assert (dataset.label_dim, dataset.vectors) == (3, True)
    assert dataset.labels(np.array([1, 0])).tolist() == [[0.5, 2, -1], [1, 0, 3]]
    _label(folder, {"labels": [["b.png", [0.5, 2]], ["a.png", [1, 0, 3]]]})
    refused(folder, "labels of lengths 2, 3")


def test_folders_are_classes_in_alphabetical_order(folder: Path, pack: Pack) -> None:
    for name in ("dog/2.png", "cat/1.png", "dog/1.png", "ant/7.png"):
        write(folder / name)
    dataset = open_dataset(str(pack(folder)))
    assert (dataset.label_dim, dataset.format.classes) == (3, ("ant", "cat", "dog"))
    assert dataset.labels(np.arange(4)).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("names", [("00000/1.png", "00001/2.png"), ("a/b/1.png", "c/2.png"), ("1.png", "a/2.png")])
def test_other_folders_are_none(folder: Path, names: tuple[str, str]) -> None:
    """Those of the official layout, of more levels, or beside files."""
    for name in names:
        write(folder / name)
    assert open_dataset(folder).label_dim == 0


def test_webdataset_s_classes_lie_beside_the_images(folder: Path) -> None:
    for i, label in enumerate((2, 0, 1)):
        write(folder / f"{i}.png", seed=i)
        (folder / f"{i}.cls").write_text(str(label))
    for name, members in (("a.tar", (2,)), ("b.tar", (0, 1))):
        with tarfile.open(folder.parent / name, "w") as tar:
            for i in members:
                for suffix in ("png", "cls"):
                    tar.add(folder / f"{i}.{suffix}", f"{i}.{suffix}")
    one = open_dataset(folder.parent / "b.tar")
    assert one.labels(np.arange(2)).tolist() == [2, 0]
    shards = folder.parent / "shards"
    shards.mkdir()
    for name in ("a.tar", "b.tar"):
        (folder.parent / name).rename(shards / name)
    both = open_dataset(shards)
    assert both.labels(np.arange(3)).tolist() == [1, 2, 0]
    np.testing.assert_array_equal(both.read(np.arange(3)), open_dataset(folder).read(np.array([2, 0, 1])))
    (folder / "1.cls").unlink()
    refused(folder, r"1\.png must have its class in a \.cls beside it, got none")


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "^data must be digits, or a folder, .*, got '.*gone', which does not exist: ")
    refused(tmp_path / "gone.zip", "which does not exist")
    (tmp_path / "file.rar").write_bytes(b"")
    refused(tmp_path / "file.rar", "which is none of these")


def test_data_without_images_is_refused(folder: Path, pack: Pack) -> None:
    (folder / "notes.txt").write_text("no image")
    path = pack(folder)
    refused(path, rf"^data must hold images \(\.png .*\), got none in {path}: ")


def test_all_faults_are_named_at_once(folder: Path, pack: Pack) -> None:
    """Also those that opening did not see, as soon as one is read."""
    for i in range(4):
        write(folder / f"{i}.png")
    write(folder / "4.png", size=(16, 12))
    write(folder / "5.png", mode="L")
    (folder / "6.png").write_bytes(b"no image")
    refused(
        pack(folder),
        r"^images must all be like most of them, 8x8 colour, got 3 of 7 that are not: .*4\.png is 16x12 colour; "
        r".*5\.png is 8x8 grey; .*6\.png is not an image that Pillow can read: make them alike",
    )


def test_faults_beyond_the_sample_are_found_when_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_SAMPLE", 2)
    for i in range(6):
        write(folder / f"{i}.png")
    for name in ("1.png", "5.png"):
        write(folder / name, mode="L")
    dataset = open_dataset(folder)
    with pytest.raises(InputError, match=r"2 of 6 that are not: .*1\.png is 8x8 grey; .*5\.png is 8x8 grey: "):
        dataset.read(np.array([0, 1]))


def test_images_may_be_wider_than_high(folder: Path) -> None:
    write(folder / "1.png", size=(8, 6))
    assert open_dataset(folder).shape == (3, 6, 8)


def test_images_of_16_bits_are_floats(folder: Path) -> None:
    """As samples with a mean and a deviation of their own."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (2, 5, 8)).astype(np.uint16)
    for i, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{i}.png")
    dataset = open_dataset(folder)
    assert (dataset.shape, dataset.format.codec.stored) == ((1, 5, 8), "float32")
    np.testing.assert_array_equal(dataset.read(np.arange(2))[:, 0], values)
    encoded = dataset.format.codec.encode(dataset.read(np.arange(2)))
    assert (encoded.mean(), encoded.std()) == pytest.approx((0, 0.5), abs=1e-5)


def test_links_out_of_a_folder_and_names_out_of_an_archive_are_refused(folder: Path) -> None:
    write(folder / "1.png")
    write(folder.parent / "secret.png")
    (folder / "2.png").symlink_to(folder / "1.png")
    assert len(open_dataset(folder)) == 2
    (folder / "3.png").symlink_to(folder.parent / "secret.png")
    refused(folder, r"^links in a folder of data must lead to files in it, got .*3\.png to .*secret\.png: ")
    with zipfile.ZipFile(folder.parent / "x.zip", "w") as file:
        file.write(folder / "1.png", "../1.png")
    refused(folder.parent / "x.zip", r"^names in .*x\.zip must stay within it, got '\.\./1\.png': ")


def test_a_file_that_unpacks_to_more_than_it_says_is_refused(folder: Path) -> None:
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("1.png", bytes(1 << 20))
    content = bytearray(path.read_bytes())
    for place, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = content.index(place) + offset
        content[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "1 of 1 that are not: .*cannot be read .*more content than it declares")


def test_an_absurdly_large_image_is_refused_unread(folder: Path) -> None:
    Image.new("1", (20000, 8)).save(folder / "1.png")
    refused(folder, "images must be at most 16384 pixels wide and high, got 20000x8 grey")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "signature alone"])
def test_a_file_that_is_no_image_is_refused_and_named(folder: Path, pack: Pack, content: bytes) -> None:
    write(folder / "1.png")
    (folder / "2.png").write_bytes(content)
    refused(pack(folder), r"got 1 of 2 that are not: .*2\.png (is not an image|cannot be read)")


def test_a_broken_zip_is_refused_and_named(folder: Path) -> None:
    write(folder / "1.png")
    path = as_zip(folder)
    path.write_bytes(path.read_bytes()[:-30])
    refused(path, rf"^data must be readable, got 'not a zip that can be read: no directory' from {path}: ")


def test_a_zip_with_a_damaged_member_names_it(folder: Path) -> None:
    path = folder / "data.zip"
    write(folder / "1.png", size=(64, 64))
    with zipfile.ZipFile(path, "w") as file:
        file.write(folder / "1.png", "1.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    refused(path, r"data\.zip/1\.png cannot be read .*content that does not match its checksum")


def test_a_file_that_changes_size_afterwards_is_refused(folder: Path) -> None:
    write(folder / "1.png")
    dataset = open_dataset(str(folder))
    write(folder / "1.png", size=(4, 4))
    with pytest.raises(InputError, match=r"1\.png is 4x4 colour"):
        dataset.read(np.array([0]))


def test_labels_of_files_that_are_not_there_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder / "0.png")
    table = [["0.png", 0], ["gone.png", 1], ["lost.png", 1]]
    (folder / "dataset.json").write_text(json.dumps({"labels": table}))
    assert len(open_dataset(folder)) == 1
    assert f"{folder}/dataset.json names gone.png and 1 more, which is not there: it is left out" in caplog.text


def test_two_files_of_one_name_in_a_zip_are_refused(folder: Path, tmp_path: Path) -> None:
    write(folder / "0.png")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.write(folder / "0.png", "0.png")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(folder / "0.png", "0.png")
    refused(tmp_path / "two.zip", r"two files '0\.png'")
