"""The snapshot format of all ports: precision, atomic writes, and clear messages about damaged files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stored_files import unchecked

from backends.pipeline.checkpoints import safetensors_io
from backends.pipeline.checkpoints.checksums import PIECE, of_array
from backends.pipeline.checkpoints.safetensors_io import TensorFile
from backends.pipeline.checkpoints.snapshots import (
    Metadata,
    Snapshot,
    load_snapshot,
    metadata_of,
    save_snapshot,
    snapshot_name,
)
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, initialize, plan

CONFIG = NetworkConfig(
    img_resolution=4,
    img_channels=1,
    label_dim=3,
    model_channels=4,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(2,),
    channels_per_head=4,
    logvar_channels=4,
)
CONSTANTS = {name for name, parameter in plan(CONFIG).parameters.items() if not parameter.trained}
PARAMS = initialize(CONFIG, seed=1) | {"unet.out_gain": np.float32(1 / 3)}
SNAPSHOT = Snapshot(params=PARAMS, config=CONFIG, nimg=8192, length=Length.of(0.05))


@pytest.fixture
def path(tmp_path):
    save_snapshot(tmp_path / "snapshot.safetensors", SNAPSHOT)
    return tmp_path / "snapshot.safetensors"


def refused(path, message):
    """With its arrays or without them, the file is refused in one line that names it."""
    for read in (lambda path: metadata_of(TensorFile(path)), load_snapshot):
        with pytest.raises(InputError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_snapshot_comes_back_rounded_to_float16_with_gains_and_constants_exact(path):
    loaded = load_snapshot(path)
    assert (loaded.config, loaded.nimg, loaded.length) == (CONFIG, 8192, Length.of(0.05))
    assert set(loaded.params) == set(PARAMS)
    for name, array in PARAMS.items():
        kept = array.astype(np.float16) if array.ndim and name not in CONSTANTS else array
        assert loaded.params[name].dtype == np.float32
        assert loaded.params[name].shape == array.shape
        assert (loaded.params[name] == kept).all()
    assert loaded.params["unet.out_gain"] == np.float32(1 / 3)


def test_the_library_reads_the_same_arrays(path):
    arrays = load_file(path)
    for name, array in load_snapshot(path).params.items():
        assert arrays[name].dtype == (np.float16 if array.ndim and name not in CONSTANTS else np.float32)
        assert (arrays[name] == array).all()


def test_metadata_is_read_without_the_arrays(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + b"\xff" * 100)
    assert metadata_of(TensorFile(path)) == Metadata(
        config=CONFIG, nimg=8192, length=Length.of(0.05), kept=frozenset(CONSTANTS), pairs=frozenset()
    )


def test_metadata_is_text_that_says_what_it_is(path):
    _, metadata = safetensors_io.read_header(path)
    assert metadata["format"] == "edm2-snapshot"
    assert (metadata["version"], metadata["nimg"], metadata["sigma_rel"]) == ("1", "8192", "0.05")
    assert json.loads(metadata["config"])["model_channels"] == 4


def test_transposed_and_strided_arrays_are_stored_by_value(tmp_path):
    name = next(name for name, array in PARAMS.items() if array.ndim == 4 and array.shape[0] > 1)
    twisted = np.ascontiguousarray(PARAMS[name].transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    assert not twisted.flags["C_CONTIGUOUS"]
    save_snapshot(tmp_path / "a", SNAPSHOT)
    save_snapshot(tmp_path / "b", replace(SNAPSHOT, params=PARAMS | {name: twisted}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_big_endian_arrays_are_stored_by_value(tmp_path):
    numbers = np.arange(6).reshape(2, 3)
    safetensors_io.write_tensors(
        tmp_path / "b", {code: numbers.astype(code) for code in (">f4", ">f2", ">i8", "<f4")}, {}
    )
    assert all(np.array_equal(array, numbers) for array in load_file(tmp_path / "b").values())


@pytest.mark.parametrize(
    ("length", "text"), [(None, ("", "")), (Length.of(0.1), ("0.1", "")), (Length.half_life(700), ("", "700.0"))]
)
def test_the_length_is_one_thing_in_memory_and_two_keys_in_the_file(tmp_path, length, text):
    save_snapshot(tmp_path / "s", replace(SNAPSHOT, length=length))
    assert load_snapshot(tmp_path / "s").length == length
    metadata = TensorFile(tmp_path / "s").metadata
    assert (metadata["sigma_rel"], metadata["half_life"]) == text


def test_someone_else_s_network_keeps_its_names_and_counters(tmp_path):
    theirs = {"head.weight": np.ones((2, 3), np.float32), "steps": np.array(2**40), "mask": np.array([True, False])}
    save_snapshot(tmp_path / "t", Snapshot(params=theirs, config=None, nimg=1, length=Length.of(0.1)))
    loaded = load_snapshot(tmp_path / "t")
    assert loaded.config is None
    assert loaded.params["steps"] == 2**40
    assert loaded.params["mask"].tolist() == [True, False]
    with pytest.raises(InputError, match="must be one of edm2's"):
        loaded.required_config()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_written(tmp_path, value):
    for name in ("unet.out_conv.weight", "unet.out_gain"):
        broken = np.array(PARAMS[name])
        broken.flat[0] = value
        with pytest.raises(InputError, match=f"must be finite to be stored, got .* in {name}: training has diverged"):
            save_snapshot(tmp_path / "s", replace(SNAPSHOT, params=PARAMS | {name: broken}))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "scale", "stored"),
    [
        ("float16", 1.0, np.float16),
        ("float16", 7e4, np.float32),  # beyond its range
        ("float16", 1e-6, np.float32),  # subnormal
        ("float16", 1e-4, np.float16),  # partly subnormal, off by less than 1e-3
        ("bfloat16", 1e38, None),
        ("bfloat16", 1e-30, None),
        ("float32", 1.0, np.float32),
    ],
)
def test_averages_are_stored_in_a_dtype_or_wider_where_it_cannot_hold_them(tmp_path, caplog, dtype, scale, stored):
    name = f"weight-{dtype}-{scale}"
    values = np.float32(scale) * np.random.default_rng(0).uniform(0.3, 1, (64, 3)).astype(np.float32)
    snapshot = Snapshot(params={name: values, "other": np.ones(2, np.float32)}, config=None, nimg=1, length=None)
    for _ in range(2):
        save_snapshot(tmp_path / "s", snapshot, dtype=dtype)
    entries = TensorFile(tmp_path / "s").entries
    assert entries[name].dtype == {None: "BF16", np.float16: "F16", np.float32: "F32"}[stored]
    assert entries["other"].dtype == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    error = np.linalg.norm(load_snapshot(tmp_path / "s").params[name] / scale - values / scale)
    assert error <= {"float16": 1e-3, "bfloat16": 2**-8, "float32": 0}[dtype] * np.linalg.norm(values / scale)
    said = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(said) == (stored == np.float32 and dtype == "float16")  # once


def test_files_of_earlier_versions_are_read_as_all_averages(tmp_path):
    metadata = {"format": "edm2-snapshot", "version": "1", "nimg": "5", "sigma_rel": "0.1", "config": "null"}
    save_file({"scale": np.ones(2, np.float16)}, tmp_path / "old", metadata=metadata)
    loaded = load_snapshot(tmp_path / "old")
    assert (loaded.kept, loaded.params["scale"].dtype) == (frozenset(), np.float32)


def test_the_largest_float16_is_still_stored(tmp_path):
    edge = np.full_like(PARAMS["unet.out_conv.weight"], 65504)
    save_snapshot(tmp_path / "s", replace(SNAPSHOT, params=PARAMS | {"unet.out_conv.weight": edge}))
    assert (load_snapshot(tmp_path / "s").params["unet.out_conv.weight"] == 65504).all()


def test_parameters_that_are_not_the_config_s_are_refused_both_ways(tmp_path, path):
    fewer = {name: array for name, array in PARAMS.items() if name != "unet.out_gain"}
    with pytest.raises(InputError, match=r"unet\.out_gain is missing"):
        save_snapshot(tmp_path / "s", replace(SNAPSHOT, params=fewer))
    arrays, (_, metadata) = load_file(path), safetensors_io.read_header(path)
    save_file({name: arrays[name] for name in fewer}, path, metadata)
    with pytest.raises(InputError, match=r"unet\.out_gain is missing"):
        load_snapshot(path)


def test_a_file_cut_short_names_the_array_and_how_many_bytes_there_are(path):
    whole, (entries, _) = path.read_bytes(), safetensors_io.read_header(path)
    last = max(entries, key=lambda name: entries[name].offset)
    need = entries[last].nbytes
    path.write_bytes(whole[:-2])
    refused(path, rf": {last} must have {need} bytes, got {need - 2}: it is cut short, copy it again$")


def test_a_flipped_bit_is_an_error_that_names_the_file_or_changes_nothing(path):
    whole, entries = path.read_bytes(), safetensors_io.read_header(path)[0]
    body, rng = min(entry.offset for entry in entries.values()), np.random.default_rng(0)
    found = 0
    for at in (*rng.integers(0, body, 300), *rng.integers(body, len(whole), 300)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read = load_snapshot(path)
        except InputError as error:
            named = [name for name, e in entries.items() if e.offset <= at < e.offset + e.nbytes]
            found += all(word in str(error) for word in (str(path), *named))
        else:  # the name of a checksum in the metadata
            assert at < body
            assert replace(read, params={}) == replace(SNAPSHOT, kept=read.kept, params={})
            assert all(np.array_equal(read.params[name], array) for name, array in load_file(path).items())
    assert found > 580


@pytest.mark.parametrize("name", ["unet.out_gain", "unet.out_conv.weight"])
def test_a_network_that_is_not_finite_is_not_read(path, name):
    stored = {n: np.array(array) for n, array in load_file(path).items()}
    stored[name][...] = np.nan
    safetensors_io.write_tensors(path, stored, TensorFile(path).metadata)
    with pytest.raises(InputError, match=rf"{name} must be finite, got other numbers"):
        load_snapshot(path)


def test_parts_of_an_array_are_checked_where_they_hold_whole_pieces(tmp_path):
    array = np.arange(2.5 * PIECE, dtype=np.float32)
    safetensors_io.write_tensors(tmp_path / "a", {"w": array}, {})
    damaged = bytearray((tmp_path / "a").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    file = TensorFile(tmp_path / "a")
    for start, count in ((0, 2 * PIECE), (PIECE, PIECE), (1, PIECE), (2 * PIECE, 5)):
        file.fill(part := np.empty(count, np.float32), "w", start)
        assert np.array_equal(part, array[start : start + count])
    for start in (0, PIECE, 2 * PIECE, 7):
        with pytest.raises(InputError, match="w must have the bytes that were written"):
            file.fill(np.empty(array.size - start, np.float32), "w", start)


@pytest.mark.parametrize("share", [0, 3, 8, 9, 200])
def test_a_file_cut_within_its_header_is_refused(path, share):
    path.write_bytes(path.read_bytes()[:share])
    refused(path, r"must have a header of \d+ bytes, got|must be a safetensors file")


def test_every_cut_is_refused(path):
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            load_snapshot(path)


def test_trailing_bytes_are_refused(path):
    size = len(path.read_bytes())
    path.write_bytes(path.read_bytes() + b"\0\0")
    refused(path, r"must have \d+ bytes of arrays, got \d+: it is damaged")
    assert path.stat().st_size == size + 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 100, b"\x80\x04." * 50, b"{}" * 40, b"\0" * 64])
def test_what_is_no_safetensors_file_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "must be a safetensors file")


def test_a_folder_or_a_missing_file_is_refused(tmp_path):
    refused(tmp_path, "must be a file that can be read")
    refused(tmp_path / "none", "must be a file that can be read, got 'No such file or directory'")


def test_another_kind_of_safetensors_file_is_refused(path):
    save_file({"x": np.zeros(3, np.float32)}, path)
    refused(path, "must have the format edm2-snapshot, got none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "version 1 or less, got '2': install a newer edm2"),
        ({"version": "new"}, "version 1 or less, got 'new'"),
        ({"nimg": "many"}, "metadata, got a fault"),
        ({"config": "{"}, "metadata, got a fault"),
        ({"config": '{"img_resolution": 7}'}, "metadata, got a fault"),
        ({"sigma_rel": "x"}, "metadata, got a fault"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(path, change, message):
    arrays, (_, metadata) = load_file(path), safetensors_io.read_header(path)
    save_file(arrays, path, metadata | change)
    refused(path, message)


def test_an_array_of_a_kind_we_never_store_is_refused_by_name(path):
    whole = path.read_bytes()
    path.write_bytes(unchecked(whole).replace(b'"unet.out_gain": {"dtype": "F32"', b'"unet.out_gain": {"dtype": "C64"'))
    assert path.read_bytes() != whole
    refused(path, "arrays must be .*, got unet.out_gain as C64")


def test_bfloat16_is_read_as_float32(tmp_path):
    values = np.array([1.0, -2.5, 3e38, 1e-40], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    text, _ = safetensors_io.layout({"w": ("BF16", (4,))}, {}, sums={"w": of_array(upper)})
    (tmp_path / "b.safetensors").write_bytes(text + upper.tobytes())
    read = safetensors_io.read_array(TensorFile(tmp_path / "b.safetensors"), "w")
    assert read.dtype == np.float32
    assert np.array_equal(read, (upper.astype(np.uint32) << 16).view(np.float32))


def test_parts_are_parts_of_the_whole(path):
    file = TensorFile(path)
    for name, whole in load_file(path).items():
        flat = whole.reshape(-1)
        for start, stop in ((0, flat.size), (flat.size // 3, flat.size // 2), (flat.size, flat.size)):
            file.fill(out := np.empty(stop - start, flat.dtype), name, start)
            assert np.array_equal(out, flat[start:stop])


def test_arrays_that_overlap_or_leave_holes_are_refused(path):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["unet.out_gain"]["data_offsets"] = [0, 4]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(InputError, match=r"safetensors file|damaged"):
        load_snapshot(path)


def test_a_failed_write_leaves_the_snapshot_that_was_there(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*bytes free"):
        save_snapshot(path, replace(SNAPSHOT, nimg=9999))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_names_are_thousands_of_images_and_three_digits_of_length():
    assert snapshot_name(196608, Length.of(0.05)) == "0000196-0.050.safetensors"
    assert snapshot_name(2 << 30, Length.of(0.1)) == "2147483-0.100.safetensors"
    assert snapshot_name(1 << 20, Length.half_life(2500)) == "0001048-h2.5.safetensors"
