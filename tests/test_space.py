"""The disk that a run needs is known before it begins, and is what it takes."""

import shutil
from collections import namedtuple

import pytest
from toy_port import config_of, train_toy

from backends.pipeline.runs.space import needed_bytes, snapshot_count, state_bytes
from edm2_core.errors import InputError

pytestmark = pytest.mark.usefixtures("toy")
Usage = namedtuple("Usage", "total used free")


def sizes(folder, pattern):
    return [path.stat().st_size for path in folder.rglob(pattern)]


@pytest.mark.parametrize(
    "options", [{}, {"snapshot": 1500}, {"half_life": 700}, {"snapshot_dtype": "float32", "keep": 2}], ids=str
)
def test_a_run_takes_what_was_computed(options):
    config = config_of(preset="toy", data="digits", **options)
    _, _, run = train_toy(checkpoint=1024, **options)
    states = sizes(run.states_path, "*.safetensors")
    assert len(states) == config.keep
    headers = 1 << 16
    assert state_bytes(config) <= states[0] <= state_bytes(config) + headers
    snapshots = sizes(run.snapshots_path, "*.safetensors")
    assert len(snapshots) == snapshot_count(config)
    assert sum(sizes(run.path, "*")) + state_bytes(config) <= needed_bytes(config)


def test_too_little_is_refused_before_the_first_step(monkeypatch, capsys):
    need = needed_bytes(config_of(preset="toy", data="digits"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, need - 1))
    with pytest.raises(InputError, match=r"must have room for its states and snapshots, 4\.\d+ MiB, got 4\.\d+ MiB"):
        train_toy()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, need))
    train_toy(duration=2048)
    assert "disk     " in capsys.readouterr().out


def test_what_a_resumed_run_already_has_counts_as_free(monkeypatch):
    _, _, run = train_toy(duration=2048)
    there = sum(sizes(run.path, "*.safetensors"))
    need = needed_bytes(config_of(preset="toy", data="digits"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, need - there))
    assert train_toy(duration=4096)[0] == 0
