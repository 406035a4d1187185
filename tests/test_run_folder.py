"""The run folder: numbering, configs, snapshots sorted by their metadata, and logs without repeated lines."""

import os

import pytest
from toy_port import CONFIG, config_of

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.runs.folder import Run, create, newest
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize

TRAINED = config_of(lr=0.02)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run():
    made = Run(create(None, "digits"))
    made.save_config(TRAINED)
    return made


def store(run, nimg, sigma_rel, config=TRAINED.network):
    length = None if sigma_rel is None else Length.of(sigma_rel)
    path = run.snapshots_path / snapshot_name(nimg, length or Length.of(0.01))
    save_snapshot(path, Snapshot(params=initialize(config, seed=0), config=config, nimg=nimg, length=length))
    return path


def test_fresh_folders_are_numbered_on_from_the_highest(tmp_path):
    assert [str(create(None, "digits")) for _ in range(2)] == ["runs/00000-digits", "runs/00001-digits"]
    (tmp_path / "runs/00041-mine").mkdir()
    (tmp_path / "runs/notes").mkdir()
    assert str(create(None, "faces")) == "runs/00042-faces"


def test_a_folder_that_is_named_is_made_and_may_exist(tmp_path):
    assert create(tmp_path / "a/b", "digits") == create(tmp_path / "a/b", "digits") == tmp_path / "a/b"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run must be writable"):
        create(tmp_path / "file/run", "digits")


def test_the_newest_run_is_the_one_last_started_or_resumed():
    paths = [create(None, "digits") for _ in range(3)]
    for age, path in zip((10, 30, 20), paths, strict=True):
        Run(path).save_config(TRAINED)
        os.utime(path / "config.json", (age, age))
    assert newest(train="train") == paths[1]


def test_where_there_is_no_run_the_train_command_is_named():
    with pytest.raises(InputError, match=r"got none in .*: train one with python -m backends.x.train, or"):
        newest(train="python -m backends.x.train")


def test_a_config_comes_back(run):
    assert run.config() == TRAINED
    assert run.exists()
    assert not Run("elsewhere").exists()


def test_what_is_no_run_folder_is_refused(tmp_path, run):
    with pytest.raises(InputError, match=r"must be a folder with a config\.json, got elsewhere"):
        Run("elsewhere").config()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a folder, got the file"):
        Run(tmp_path / "file").exists()
    run.config_path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"config\.json must be text"):
        run.config()


def test_a_run_without_its_config_is_not_taken_for_a_fresh_folder(run):
    store(run, 1024, 0.05)
    run.config_path.unlink()
    with pytest.raises(InputError, match=r"must have its config\.json, got none .*--outdir$"):
        run.exists()


def test_snapshots_are_sorted_by_time_and_length_as_their_metadata_say(run):
    path = store(run, 10_500, 0.10)
    path.rename(run.snapshots_path / "0000000-first.safetensors")
    for nimg, sigma_rel in [(2048, 0.10), (10_500, 0.05), (2048, 0.05)]:
        store(run, nimg, sigma_rel)
    found = [(s.time, s.length.value) for s in run.snapshots(TRAINED.network)]
    assert found == [(2048, 0.05), (2048, 0.10), (10_500, 0.05), (10_500, 0.10)]


def test_a_run_without_snapshots_has_none(run):
    assert run.snapshots(TRAINED.network) == []
    assert run.state_nimg() == 0


@pytest.mark.parametrize(("sigma_rel", "config"), [(None, TRAINED.network), (0.05, CONFIG)])
def test_a_snapshot_that_is_not_of_the_run_is_refused_by_name(run, sigma_rel, config):
    path = store(run, 1024, sigma_rel, config)
    with pytest.raises(InputError, match=f"averages of its network, got {path}"):
        run.snapshots(TRAINED.network)


def test_the_log_is_kept_up_to_the_state_and_a_torn_line_is_dropped(run):
    for nimg in (64, 128, 192):
        run.append_log({"nimg": nimg, "loss": float("inf") if nimg == 64 else 0.1 + nimg})
    with open(run.log_path, "a", encoding="utf-8") as file:
        file.write('{"nimg": 256, "lo')
    assert [record["nimg"] for record in run.log()] == [64, 128, 192]
    assert run.truncate_logs(128) == [{"nimg": 64, "loss": None}, {"nimg": 128, "loss": 128.1}]
    run.append_log({"nimg": 192, "loss": 1.0})
    assert run.log_path.read_text().count("\n") == 3
    assert [record["nimg"] for record in run.log()] == [64, 128, 192]


def test_damaged_lines_of_the_log_are_dropped(run):
    run.append_log({"nimg": 64, "loss": 1.0, "seconds": 2.0})
    with open(run.log_path, "a", encoding="utf-8") as file:
        file.write('{"nimg": 65, "seconds": "x"}\n{"nimg": 66, "loss": {}}\n{"nimg": 67, "loss": [1]}\n{"loss": 1}\n')
        file.write("[" * 100_000 + "]" * 100_000 + '\n{"nimg": 68, "seconds": Infinity}\n')
    assert [record["nimg"] for record in run.log()] == [64]


def test_truncating_the_log_is_all_or_nothing(run, monkeypatch):
    run.append_log({"nimg": 64})
    run.append_log({"nimg": 128})
    before = run.log_path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        run.truncate_logs(64)
    assert run.log_path.read_bytes() == before


def test_a_run_without_a_log_has_none_to_truncate(run):
    assert run.truncate_logs(0) == []
    assert not run.log_path.exists()


def test_a_changed_byte_in_a_line_of_the_log_is_said_and_the_line_passed_over(tmp_path, caplog):
    run = Run(tmp_path)
    for nimg in (64, 128, 192):
        run.append_log({"nimg": nimg, "loss": 1.25, "seconds": 0.5})
    whole = run.log_path.read_bytes()
    assert run.log() == [{"nimg": nimg, "loss": 1.25, "seconds": 0.5} for nimg in (64, 128, 192)]
    run.log_path.write_bytes(whole.replace(b"1.25", b"1.75", 1))
    assert [line["nimg"] for line in run.log()] == [128, 192]
    assert f"line 1 of {run.log_path} is damaged, and is passed over" in caplog.text
    run.log_path.write_bytes(whole[::-1].replace(b"3hxx", b"2hxx", 1)[::-1])  # the last line's own key
    assert len(run.log()) == 2
    run.log_path.write_bytes(whole + b'{"nimg": 25')  # as a killed run leaves it
    caplog.clear()
    assert len(run.log()) == 3
    assert not caplog.text
    run.log_path.write_bytes(b'{"nimg": 64, "loss": 2.0}\n')  # of an earlier version
    assert run.log() == [{"nimg": 64, "loss": 2.0}]
