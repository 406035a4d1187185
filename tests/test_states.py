"""The state of a run on disk: every part comes back unchanged, and damaged or foreign files are refused."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_port import CONFIG

from backends.pipeline.checkpoints.safetensors_io import TensorFile
from backends.pipeline.checkpoints.states import load_state, parts, read_counters, save_state
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize, plan
from edm2_core.state import State

LENGTHS = (Length.of(0.05), Length.of(0.1), Length.half_life(700))
TRAINED = [name for name, parameter in plan(CONFIG).parameters.items() if parameter.trained]


def part(seed, names=None):
    arrays = initialize(CONFIG, seed=seed)
    return {name: arrays[name] + np.float32(seed / 3) for name in (names or arrays)}


STATE = State(
    params=part(1),
    moments1=part(2, TRAINED),
    moments2=part(3, TRAINED),
    averages=dict(zip(LENGTHS, (part(4), part(5), part(6)), strict=True)),
    nimg=12345,
    steps=99,
)


@pytest.fixture
def path(tmp_path):
    save_state(tmp_path / "state" / "state.safetensors", STATE)
    return tmp_path / "state" / "state.safetensors"


def test_every_part_comes_back_bit_for_bit_and_as_itself(path):
    loaded = load_state(path, CONFIG, LENGTHS)
    assert (loaded.nimg, loaded.steps) == (12345, 99)
    assert tuple(loaded.averages) == LENGTHS
    for prefix, arrays in parts(STATE).items():
        again = parts(loaded)[prefix]
        assert set(again) == set(arrays)
        for name, array in arrays.items():
            assert again[name].dtype == np.float32
            assert again[name].tobytes() == array.tobytes()


def test_the_file_names_its_parts(path):
    arrays, name = load_file(path), "unet.out_conv.weight"
    stored = {"params": STATE.params, "adam1": STATE.moments1, "adam2": STATE.moments2}
    keys = ("ema/0.05", "ema/0.1", "ema/HalfLife(700.0)")
    stored |= {key: STATE.averages[length] for key, length in zip(keys, LENGTHS, strict=True)}
    assert all(np.array_equal(arrays[f"{prefix}/{name}"], part[name]) for prefix, part in stored.items())
    assert len(arrays) == sum(map(len, stored.values()))
    assert "adam1/unet.emb_fourier.freqs" not in arrays


def test_counters_are_read_without_the_arrays(path):
    assert read_counters(path) == (12345, 99)


def test_a_state_of_other_lengths_is_refused(path):
    with pytest.raises(InputError, match=r"must hold .*ema/0\.2, ema/HalfLife\(700\.0\), got ema/0\.1/"):
        load_state(path, CONFIG, (0.05, 0.2, LENGTHS[2]))
    with pytest.raises(InputError, match=r"ema/0\.2: parameters must be those of the config, .* is missing"):
        load_state(path, CONFIG, (*LENGTHS, 0.2))


def test_a_state_of_another_network_is_refused(path):
    with pytest.raises(InputError, match=r"params: .* must have shape"):
        load_state(path, replace(CONFIG, model_channels=8), LENGTHS)


@pytest.mark.parametrize("name", ["params/unet.out_gain", "adam2/unet.out_gain", "ema/0.1/unet.out_conv.weight"])
def test_a_state_that_lacks_an_array_is_refused_by_part_and_name(path, name):
    arrays, metadata = load_file(path), TensorFile(path).metadata
    del arrays[name]
    save_file(arrays, path, metadata)
    prefix, _, parameter = name.rpartition("/")
    with pytest.raises(InputError, match=f"{path}: {prefix}: .*{parameter} is missing"):
        load_state(path, CONFIG, LENGTHS)


def test_every_cut_and_trailing_bytes_are_refused_in_one_line(path):
    whole = path.read_bytes()
    for damaged in (*(whole[:end] for end in range(0, len(whole), 4001)), whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            load_state(path, CONFIG, LENGTHS)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "edm2-snapshot"}, "must have the format edm2-state, got edm2-snapshot"),
        ({"version": "2"}, "version 1 or less, got '2': install a newer edm2"),
        ({"nimg": "x"}, "metadata, got a fault"),
    ],
)
def test_metadata_of_something_else_is_refused(path, change, message):
    arrays, metadata = load_file(path), TensorFile(path).metadata
    save_file(arrays, path, metadata | change)
    with pytest.raises(InputError, match=message):
        load_state(path, CONFIG, LENGTHS)


def test_a_failed_write_leaves_the_state_that_was_there(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_state(path, replace(STATE, nimg=1))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
