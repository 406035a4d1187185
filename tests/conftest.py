"""What several test files begin with."""

import pytest
from toy_port import PRESET

from edm2_core.presets import PRESETS


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An empty folder, where short runs on a toy's network may be made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setitem(PRESETS, "toy", PRESET)
    return tmp_path
