"""Float arrays, latents, tables, conditions and parts of data."""

import json
import os
import pickle
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import Pack, as_zip, refused, write
from hypothesis import given
from hypothesis import strategies as st

from backends.pipeline.checkpoints.safetensors_io import write_tensors
from backends.pipeline.data import statistics
from backends.pipeline.data.batches import Reading, prepared
from backends.pipeline.data.datasets import InMemory, StoredDataset, held_out, open_dataset
from backends.pipeline.runs.resolve import configure
from backends.ports import Machine
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError

# ---- float arrays


def _fields(count: int = 12) -> np.ndarray:
    scale = np.array([1, 10, 0.1])[:, None, None]
    return (np.random.default_rng(0).standard_normal((count, 3, 4, 6)) * scale + 5 * scale).astype(np.float32)


@pytest.mark.parametrize(
    "kind", ["npy", "npy of float64", "channels last", "npz", "safetensors", "files", "zip of files"]
)
def test_float_arrays_of_every_kind_are_the_same_data(folder: Path, kind: str) -> None:
    fields = _fields()
    path = folder / "fields.npy"
    match kind:
        case "npy":
            np.save(path, fields)
        case "npy of float64":
            np.save(path, np.asfortranarray(fields.astype(np.float64)))
        case "channels last":
            np.save(path, fields.transpose(0, 2, 3, 1))
        case "npz":
            path = path.with_suffix(".npz")
            np.savez_compressed(path, images=fields, labels=np.arange(12) % 4)
        case "safetensors":
            path = path.with_suffix(".safetensors")
            write_tensors(path, {"images": fields, "labels": np.arange(12) % 4}, {})
        case _:
            for i, field in enumerate(fields):
                np.save(folder / f"{i:02d}.npy", field)
            path = folder if kind == "files" else as_zip(folder)
    dataset = open_dataset(path)
    assert (dataset.shape, len(dataset), dataset.format.codec.stored) == ((3, 4, 6), 12, "float32")
    np.testing.assert_array_equal(dataset.read(np.array([3, 0, 11])), fields[[3, 0, 11]])
    codec = dataset.format.codec
    np.testing.assert_allclose(codec.mean, fields.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(codec.scale, 2 * fields.std(axis=(0, 2, 3), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(codec.decode(codec.encode(fields)), fields, rtol=1e-5)
    assert dataset.label_dim == (4 if kind in ("npz", "safetensors") else 0)


def test_bytes_are_pixels_only_where_they_may_be_pictures(folder: Path) -> None:
    """Of other channels they are numbers like any others, float32 when they are read."""
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 4), dtype=np.uint8)
    for channels, stored, dtype in ((5, "float32", np.float32), (3, "uint8", np.uint8)):
        np.save(folder / "a.npy", values[:, :channels])
        dataset = open_dataset(folder / "a.npy")
        read = dataset.read(np.arange(6))
        assert (dataset.format.codec.stored, read.dtype) == (stored, dtype)
        np.testing.assert_array_equal(read, values[:, :channels])


def test_statistics_beside_the_data_are_used_and_those_of_other_data_refused(folder: Path) -> None:
    path = folder / "fields.npy"
    np.save(path, _fields())
    measured = statistics.measure(open_dataset(path).items)
    statistics.save(replace(measured, mean=(1.0, 2.0, 3.0)), path)
    assert open_dataset(path).format.codec.mean == (1, 2, 3)
    np.save(path, _fields(13))
    refused(path, r"statistics must be those of the data, 13 of \[3, 4, 6\], got 12 of \[3, 4, 6\]")
    statistics.stored_path(path).write_text("{")
    refused(path, "must be what edm2 dataset stats wrote")


def test_a_large_mean_costs_no_digits(folder: Path) -> None:
    fields = (1e6 + np.random.default_rng(0).standard_normal((500, 1, 8, 8))).astype(np.float64)
    np.save(folder / "a.npy", fields)
    (scale,) = open_dataset(folder / "a.npy").format.codec.scale
    assert scale == pytest.approx(2 * fields.astype(np.float32).astype(np.float64).std(), rel=1e-6)


def test_a_value_that_is_not_finite_is_named_by_file_and_place(folder: Path) -> None:
    fields = _fields(3)
    fields[2, 1, 3, 4] = np.nan
    for i, field in enumerate(fields):
        np.save(folder / f"{i}.npy", field)
    refused(folder, r"^data must be finite, got nan in .*2\.npy, channel 1, row 3, column 4: ")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 5, 5)), "each channel must vary, got the same value everywhere in channel 0, 1, 2"),
        (np.zeros((4, 3)), r"must be \[N, C, H, W\], .* got shape \(4, 3\)"),
        (np.zeros((0, 3, 5, 5)), r"got shape \(0, 3, 5, 5\)"),
        (np.zeros((4, 3, 5, 5), complex), "an array of complex128"),
        (np.array([["a"]]), "an array of <U1"),
    ],
    ids=["constant", "two axes", "empty", "complex", "text"],
)
def test_arrays_that_are_no_data_are_refused(folder: Path, array: np.ndarray, message: str) -> None:
    np.save(folder / "a.npy", array)
    refused(folder / "a.npy", message)


def test_nothing_in_an_array_file_is_executed(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(folder / "a.npy", "data must be readable, got .*")


def test_arrays_of_two_shapes_are_refused(folder: Path) -> None:
    np.save(folder / "1.npy", np.ones((3, 4, 6)))
    np.save(folder / "2.npy", np.ones((3, 4, 7)))
    refused(folder, r"arrays of data must have one shape, got \(3, 4, 7\) in .*2\.npy for \(3, 4, 6\) in .*1\.npy")


def test_labels_of_an_array_may_be_vectors(folder: Path) -> None:
    np.save(folder / "a.npy", _fields())
    np.save(folder / "a-labels.npy", np.ones((12, 5), np.float32))
    dataset = open_dataset(folder / "a.npy")
    assert (dataset.label_dim, dataset.vectors) == (5, True)
    np.save(folder / "a-labels.npy", np.ones(11, np.int64))
    refused(folder / "a.npy", r"labels must be 12 whole numbers \[N\] or vectors")


def test_two_kinds_in_one_folder_are_refused_unless_one_is_chosen(folder: Path) -> None:
    write(folder / "1.png")
    np.save(folder / "1.npy", _fields()[0])
    refused(folder, r"data must be of one kind, got 1 images and 1 \.npy")
    assert open_dataset(folder, kind="images").shape == (3, 8, 8)
    assert open_dataset(folder, kind="arrays").shape == (3, 4, 6)


# ---- latents

OFFICIAL = Path(os.environ.get("EDM2_OFFICIAL", "../shared/official"))


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the official archives are not here")
def test_the_official_archive_of_latents_is_recognised() -> None:
    dataset = open_dataset(OFFICIAL / "latents-sd.zip")
    codec = dataset.format.codec
    assert (dataset.shape, dataset.label_dim, len(dataset)) == ((4, 64, 64), 3, 12)
    assert (codec.stored, codec.vae) == ("moments", "stabilityai/sd-vae-ft-mse")
    normal = np.random.default_rng(0).standard_normal((24, 4, 64, 64)).astype(np.float32)
    images, rows, _ = prepared(Reading(dataset, seed=0)(0, 24), dataset.format, label_dim=3, normal=normal)
    assert images.std() == pytest.approx(0.5, abs=0.01)
    assert rows.sum(axis=1).tolist() == [1] * 24


def _latents(folder: Path, *, moments: bool, manifest: dict[str, Any] | None = None) -> Path:
    rng = np.random.default_rng(0)
    for i in range(4):
        mean, std = rng.standard_normal((2, 6, 6)), rng.uniform(0.1, 0.2, (2, 6, 6))
        np.save(folder / f"{i}.npy", np.concatenate([mean, std] if moments else [mean]).astype(np.float32))
    written = {"encoder": "mine", "moments": moments, "mean": [1, 2], "std": [3, 4]} | (manifest or {})
    (folder / "latents.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("port", ["torch", "jax", "mlx"])
def test_latents_are_drawn_anew_each_time_an_image_is_seen(folder: Path, pack: Pack, port: str) -> None:
    """By a trainer, as a function of (seed, images seen): z of m + s z is standard normal, and independent of the
    noise."""
    pytest.importorskip({"mlx": "mlx.core"}.get(port, port))
    dataset = open_dataset(pack(_latents(folder, moments=True)))
    assert dataset.shape == (2, 6, 6)
    network = {
        "channel_mult": (1,),
        "num_blocks": 1,
        "model_channels": 8,
        "channels_per_head": 8,
        "attn_resolutions": (),
    }
    config = configure(dataset, preset_name="digits", unconditional=True, network=network, batch=64, duration=128)
    names = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
    make = getattr(import_module(f"backends.{port}.trainer"), names[port])
    trainer, again = make(config, Machine()), make(config, Machine())
    stored = Reading(dataset, seed=0)(0, 64)
    batches = [drawn(t, t.place(stored)) for t in (trainer, again)]
    np.testing.assert_array_equal(batches[0][0], batches[1][0])
    trainer.step(trainer.place(stored), lr=0.01)
    later, _ = drawn(trainer, trainer.place(stored))
    mean, std = np.split(stored.images, 2, axis=1)
    zs = [(dataset.format.codec.decode(images) - mean) / std for images in (batches[0][0], later)]
    for z in zs:
        assert abs(z.mean()) < 6 / z.size**0.5
        assert abs(z.std() - 1) < 6 / (2 * z.size) ** 0.5 + 1e-3
    for other in (zs[1], batches[0][1]):
        assert abs(np.mean(zs[0] * other)) < 6 / zs[0].size ** 0.5


def drawn(trainer: Any, placed: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images and the noise of the next step, [N, C, H, W]."""
    made = trainer._draw(placed, trainer._key()) if hasattr(trainer, "_draw") else trainer._batch(placed)
    batch = made if hasattr(made, "images") else made[0]
    arrays = (np.asarray(batch.images), np.asarray(batch.unit_noise))
    images, noise = (a if a.shape[1] == 2 else a.transpose(0, 3, 1, 2) for a in arrays)
    return images, noise


@pytest.mark.parametrize("files", [False, True])
def test_a_layout_that_is_asked_for_is_kept_whatever_the_sizes(folder: Path, files: bool) -> None:
    """Six channels of 8x4 pixels: by the sizes alone, their columns would be the channels."""
    array = np.random.default_rng(0).normal(size=(5, 6, 8, 4)).astype(np.float32)
    for name, stored in (("chw", array), ("hwc", array.transpose(0, 2, 3, 1))):
        path = folder / f"{name}{'' if files else '.npy'}"
        if files:
            path.mkdir()
            for i, sample in enumerate(stored):
                np.save(path / f"{i}.npy", sample)
        else:
            np.save(path, stored)
        data = open_dataset(path, kind=f"arrays-{name}")
        assert data.shape == (6, 8, 4)
        assert np.array_equal(data.read(np.arange(5)), array)
        again = pickle.loads(pickle.dumps(data))  # as a worker gets it
        assert np.array_equal(again.read(np.arange(5)), array)
    assert open_dataset(folder / ("chw" if files else "chw.npy")).shape == (4, 6, 8)


def test_latents_of_more_channels_than_rows_are_not_turned(folder: Path) -> None:
    """Whatever their sizes; of other arrays the last axis is that of channels only where it is the shortest."""
    np.save(folder / "a.npy", np.random.default_rng(0).standard_normal((16, 9, 8)))
    manifest = {"encoder": "mine", "moments": False, "mean": [0] * 16, "std": [1] * 16}
    (folder / "latents.json").write_text(json.dumps(manifest))
    assert open_dataset(folder).shape == (16, 9, 8)
    for shape, wanted in (((5, 16, 8, 8), (16, 8, 8)), ((5, 8, 6, 5), (5, 8, 6)), ((5, 3, 8, 8), (3, 8, 8))):
        np.save(folder.parent / "a.npy", np.random.default_rng(0).standard_normal(shape))
        assert open_dataset(folder.parent / "a.npy").shape == wanted


def test_plain_latents_are_those_of_the_manifest(folder: Path) -> None:
    dataset = open_dataset(_latents(folder, moments=False))
    codec = dataset.format.codec
    assert (codec.stored, codec.mean, codec.scale, codec.vae) == ("float32", (1, 2), (6, 8), "mine")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"mean": [1, 2, 3], "std": [1, 1, 1]}, "must fit the latents, got 3 channels for 2"),
        ({"mean": [1]}, "mean and std must have a number for each channel"),
        ({"std": [1, 0]}, "must have encoder, moments, mean and std, got .*positive scales"),
        ({"moments": "yes"}, "moments true or false"),
        ({"encoder": None}, "encoder must be text"),
        ({"std": "x"}, "must have encoder, moments, mean and std"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, manifest: Any, message: str) -> None:
    refused(_latents(folder, moments=False, manifest=manifest), message)


def test_latents_without_a_manifest_are_refused(folder: Path) -> None:
    (_latents(folder, moments=False) / "latents.json").unlink()
    with pytest.raises(InputError, match=r"latents must have a latents\.json with encoder, .* got none"):
        open_dataset(folder, kind="latents")


# ---- tables


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_hugging_face_are_images_with_labels_and_names(folder: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    for i in range(3):
        write(folder / f"{i}.png", seed=i)
    rows = [{"bytes": (folder / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(3)]
    names = {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    table = pa.table({"image": rows, "label": [1, 0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": names})}
    )
    saved = folder.parent / "saved"
    saved.mkdir()
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, saved / "0.parquet")
    else:
        with (
            pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table)
        (saved / "state.json").write_text("{}")
    dataset = open_dataset(saved)
    assert (dataset.shape, dataset.format.classes) == ((3, 8, 8), ("cat", "dog"))
    assert dataset.labels(np.arange(3)).tolist() == [1, 0, 1]
    np.testing.assert_array_equal(dataset.read(np.arange(3)), open_dataset(folder).read(np.arange(3)))
    again = pickle.loads(pickle.dumps(dataset))  # as a worker receives it
    np.testing.assert_array_equal(again.read(np.array([2])), dataset.read(np.array([2])))


# ---- conditions, parts


def test_a_condition_comes_with_its_sample(folder: Path) -> None:
    np.save(folder / "x.npy", _fields())
    np.save(folder / "c.npy", _fields()[:, :2] + 1)
    dataset = open_dataset(folder / "x.npy", condition=folder / "c.npy")
    assert dataset.cond_channels == 2
    batch = Reading(dataset, seed=0)(0, 5)
    np.testing.assert_array_equal(batch.condition, batch.images[:, :2] + 1)
    _, _, condition = prepared(batch, dataset.format, label_dim=0)
    assert condition.shape == (5, 2, 4, 6)
    np.save(folder / "c.npy", _fields(11))
    with pytest.raises(InputError, match="same size as the data, 12 of 6x4, got 11 of 6x4"):
        open_dataset(folder / "x.npy", condition=folder / "c.npy")


@given(st.integers(2, 60), st.floats(0.02, 0.98), st.integers(0, 5))
def test_held_out_samples_are_a_part_that_depends_on_the_seed(size: int, share: float, seed: int) -> None:
    items = InMemory(np.arange(size, dtype=np.uint8)[:, None, None, None], "x")
    whole = StoredDataset("x", "x", items, DataFormat())
    if not 0 < round(size * share) < size:
        with pytest.raises(InputError, match="--holdout must leave samples on both sides"):
            held_out(whole, share, seed=seed)
        return
    kept, held = held_out(whole, share, seed=seed)
    assert held is not None
    parts = [part.read(np.arange(len(part))).ravel().tolist() for part in (kept, held)]
    assert sorted(parts[0] + parts[1]) == list(range(size))
    assert len(held) == round(size * share)
