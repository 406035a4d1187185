"""Averages of any length from stored ones: exact where stored, close to the truth elsewhere, each file read once."""

from dataclasses import replace

import numpy as np
import pytest

from backends.pipeline.checkpoints import safetensors_io
from backends.pipeline.checkpoints.checksums import of_array
from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.reconstruct import averages, reconstruct
from backends.pipeline.checkpoints.safetensors_io import DTYPES, TensorFile, layout
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot, snapshot_name
from backends.pipeline.checkpoints.sources import open_sources
from edm2_core.ema import Length, beta, coefficients
from edm2_core.errors import InputError

STEP, STEPS, EVERY = 128, 400, 25


def walk():
    """A smooth path of weights over training, with some noise; what averages are taken of."""
    generator = np.random.default_rng(3)
    t = np.arange(1, STEPS + 1)[:, None] / STEPS
    return np.cos(3 * t + np.arange(7)) + 0.1 * generator.standard_normal((STEPS, 7))


def tracked(sigma_rel, until=STEPS):
    average = np.zeros(7)
    for step, weights in enumerate(walk()[:until], 1):
        keep = beta(sigma_rel, t_next=step * STEP, t_delta=STEP)
        average = keep * average + (1 - keep) * weights
    return average


def name_of(step, sigma_rel):
    return snapshot_name(step * STEP, Length.of(sigma_rel))


@pytest.fixture
def folder(tmp_path):
    for sigma_rel in (0.05, 0.10):
        for step in range(EVERY, STEPS + 1, EVERY):
            params = {"w": tracked(sigma_rel, step).astype(np.float32), "steps": np.array(step)}
            path, length = tmp_path / "snapshots" / name_of(step, sigma_rel), Length.of(sigma_rel)
            save_snapshot(path, Snapshot(params=params, config=None, nimg=step * STEP, length=length))
    return tmp_path


def test_other_lengths_come_close_to_what_tracking_them_would_have_given(folder):
    lengths = [0.04, 0.07, 0.10, 0.15, 0.20]
    for sigma_rel, snapshot in zip(lengths, reconstruct(open_sources(folder), sigma_rels=lengths), strict=True):
        truth = tracked(sigma_rel)
        assert (snapshot.nimg, snapshot.length) == (STEPS * STEP, Length.of(sigma_rel))
        assert snapshot.params["w"].dtype == np.float32
        assert np.linalg.norm(snapshot.params["w"] - truth) < 0.01 * np.linalg.norm(truth)


def test_a_stored_average_comes_as_it_is_stored(folder):
    path = folder / "snapshots" / name_of(200, 0.05)
    (snapshot,) = reconstruct(open_sources(folder), time=200 * STEP, sigma_rels=[0.05])
    assert np.array_equal(snapshot.params["w"], load_snapshot(path).params["w"])


def test_the_result_is_the_least_squares_combination_of_what_was_stored_up_to_then(folder):
    nimg = 210 * STEP
    (snapshot,) = reconstruct(open_sources(folder), time=nimg, sigma_rels=[0.08])
    stored = [load_snapshot(path) for path in sorted(folder.glob("snapshots/*"))]
    weights = coefficients(
        in_time=[s.nimg for s in stored], in_sigma_rel=[s.length for s in stored], out_time=nimg, out_sigma_rel=0.08
    )
    wanted = sum(w * s.params["w"].astype(np.float64) for w, s in zip(weights[:, 0], stored, strict=True))
    assert np.count_nonzero(weights) == 16
    assert np.allclose(snapshot.params["w"], wanted, rtol=0, atol=1e-5)
    assert snapshot.params["steps"] == 200


def test_snapshots_after_the_target_are_not_even_read(folder):
    for path in (folder / "snapshots").glob("*"):
        if load_snapshot(path).nimg > 200 * STEP:
            damaged = replace(load_snapshot(path), params={"w": np.full(7, 999, np.float32), "steps": np.array(0)})
            save_snapshot(path, damaged)
    (snapshot,) = reconstruct(open_sources(folder), time=200 * STEP, sigma_rels=[0.07])
    assert np.linalg.norm(snapshot.params["w"] - tracked(0.07, 200)) < 0.02


def test_however_many_are_wanted_every_file_is_read_once(folder, monkeypatch):
    read, opened = [], []
    fill, read_header = TensorFile.fill, safetensors_io.read_header

    def spying_fill(file, out, name, start):
        read.append((file.path, name))
        fill(file, out, name, start)

    def spying_read_header(path):
        opened.append(path)
        return read_header(path)

    monkeypatch.setattr(TensorFile, "fill", spying_fill)
    monkeypatch.setattr(safetensors_io, "read_header", spying_read_header)
    reconstruct(open_sources(folder), sigma_rels=[0.03, 0.07, 0.2])
    paths = sorted((folder / "snapshots").glob("*"))
    assert sorted(path for path, name in read if name == "w") == paths
    assert sorted(opened) == paths


def test_a_run_its_snapshots_folder_and_their_paths_are_the_same_source(folder):
    sources = (folder, folder / "snapshots", sorted((folder / "snapshots").glob("*"))[::-1], str(folder))
    results = [reconstruct(open_sources(source), sigma_rels=[0.13])[0].params["w"] for source in sources]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_rels": [0.3]}, r"sigma_rel must be within \(0, 0\.2887\), got 0\.3"),
        ({"sigma_rels": [0.1], "time": 100}, "must be from 3200 to 51200 images, got 100"),
        ({"sigma_rels": [0.1], "time": 51201}, "must be from 3200 to 51200 images, got 51201"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        reconstruct(open_sources(folder), **options)


def test_without_snapshots_there_is_nothing_to_reconstruct_from(tmp_path):
    with pytest.raises(InputError, match=r"must hold snapshots .*, got nothing in"):
        open_sources(tmp_path)
    for nothing in (lambda: open_sources([]), lambda: reconstruct([], sigma_rels=[0.1])):
        with pytest.raises(InputError, match=r"must be one or more.*, got none"):
            nothing()


def test_raw_weights_are_no_average_to_reconstruct_from(folder):
    raw = folder / "snapshots" / "raw.safetensors"
    save_snapshot(raw, Snapshot(params={"w": np.zeros(7)}, config=None, nimg=128, length=None))
    with pytest.raises(InputError, match=f"{raw} does not say what was averaged"):
        open_sources(folder)


def test_files_of_several_dtypes_are_added_up(tmp_path):
    arrays = np.random.default_rng(0).standard_normal((4, 5000)).astype(np.float32)
    for step, (code, array) in enumerate(zip(("F16", "BF16", "F32", "F64"), arrays, strict=True), 1):
        bits = (array.view(np.uint32) >> 16).astype("<u2") if code == "BF16" else array.astype(DTYPES[code])
        text, _ = layout({"w": (code, (5000,))}, {}, sums={"w": of_array(bits)})
        (tmp_path / f"{step}000.safetensors").write_bytes(text + bits.tobytes())
    sources = open_sources(tmp_path, described=Described(lengths=(Length.of(0.1),)))
    combination = Combination.of(sources, sigma_rels=[0.2, 0.07])
    for average, row in zip(averages(combination), combination.weights_of("w"), strict=True):
        assert np.allclose(average.params["w"], row @ arrays, atol=0.02 * np.abs(row).sum())


def test_a_source_is_loaded_from_the_file_that_is_open(folder):
    first, *_ = open_sources(folder)
    expected = load_snapshot(first.path)
    loaded = first.load()
    assert (loaded.config, loaded.nimg, loaded.length) == (None, expected.nimg, expected.length)
    assert loaded.params.keys() == expected.params.keys()
    assert all(np.array_equal(array, expected.params[name]) for name, array in loaded.params.items())


def test_a_source_that_is_removed_while_it_is_read_is_named(folder):
    """As a snapshot plan does beside a reader."""
    sources = open_sources(folder)
    sources[1].path.unlink()
    with pytest.raises(InputError, match=f"{sources[1].path.name} must stay until it is read.*give the command again"):
        reconstruct(sources, sigma_rels=[0.07])


def test_a_length_that_snapshots_cannot_give_is_warned_of(folder, caplog):
    sources = open_sources(folder)
    reconstruct(sources, sigma_rels=[0.07])
    assert caplog.text == ""
    reconstruct(sources[-2:], sigma_rels=[0.001])
    assert "to give an average of sigma_rel 0.001, got a predicted error of " in caplog.text
