"""Fixtures of several test files, and how tests are divided over processes."""

import pytest
from data_files import as_folder, as_zip
from toy_port import PRESET, ToySampler
from xdist.scheduler import LoadScopeScheduling

from backends.pipeline.checkpoints import safetensors_io
from edm2_core.presets import PRESETS

# which train on digits, or check types, for all their tests
ONE_PROCESS = ("test_torch_commands.py", "test_typing.py", "test_experiment_trackers.py")


class OneByOne(LoadScopeScheduling):
    """Tests go to whichever process is free, those of each file in ONE_PROCESS to one: first, as they are many."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return file if file.endswith(ONE_PROCESS) else nodeid


def pytest_xdist_make_scheduler(config, log):
    return OneByOne(config, log)  # pytest-xdist's own groups are lost on pytest 9.2


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An empty folder, where short runs on a toy's network may be made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setitem(PRESETS, "toy", PRESET)
    return tmp_path


@pytest.fixture
def toy_reports(toy, monkeypatch):
    """:func:`toy`, where edm2 report samples with the toy's port."""
    monkeypatch.setattr("backends.commands.report.open_port", lambda name: ("toy", ToySampler()))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of the toy with telemetry, to be read alone."""
    from report_runs import train

    return train(tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture
def folder(tmp_path):
    """An empty folder for data."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture(params=[as_folder, as_zip], ids=["folder", "zip"])
def pack(request):
    """What leaves a folder as it is, or makes a .zip of it."""
    return request.param


@pytest.fixture
def headers_read(monkeypatch):
    """The paths of the safetensors files whose header was read, once for each time."""
    paths, read_header = [], safetensors_io.read_header
    monkeypatch.setattr(safetensors_io, "read_header", lambda path: paths.append(path) or read_header(path))
    return paths


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this test's own, and nothing in the cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    from hub_server import HubServer

    server = HubServer()
    known = {"ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": True}
    known |= {"HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
    known |= {"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False}
    for name, value in known.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_ada")
    yield server
    server.close()
