"""Runs, data and networks at URLs: in fsspec's in-memory file system, and on a server of FTP."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_port import CONFIG, PRESET, PROG, ToySampler, ToyTrainer, options_of, run_toy, train_toy

from backends.commands.cli import main as edm2
from backends.pipeline.checkpoints import hub, remote, states
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.checkpoints.states import load_state
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import mirror
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.networks import open_network
from backends.pipeline.runs.options import SampleOptions
from edm2_core.errors import InputError

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return system


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """A host's cache, and how to move to another host."""

    def host(name):
        for module in (remote, mirror):
            monkeypatch.setattr(module, "CACHE", tmp_path / "hosts" / name)

    host("first")
    return host


def train(url, trainer=ToyTrainer, **options):
    opened = []

    def open_trainer(config, machine):
        opened.append(trainer(config, machine))
        return opened[0]

    options = {"preset": "toy", "data": "digits", "no_picture": True} | options
    status = run_toy(open_trainer, ToySampler(), prog=PROG, outdir=url, **options)
    return status, opened[0] if opened else None


def copied(system, root):
    """The files at ``root`` by name."""
    return {name: system.cat_file(f"{root}/{name}" if name else root) for name in remote.found_at(system, root)}


def here(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_run_at_a_url_is_copied_there_whole_and_nothing_else_is(memory):
    url = "memory://bucket/runs/one"
    train(url, duration=2048, checkpoint=512)
    assert copied(memory, "/bucket/runs/one") == here(mirror.folder_of(url))
    assert {"config.json", "log.jsonl"} < copied(memory, "/bucket/runs/one").keys()


def test_on_another_host_it_goes_on_where_it_was(memory, caches):
    url = "memory://bucket/run"
    train(url, duration=1024)
    caches("second")
    status, trainer = train(url, duration=2048)
    assert (status, trainer.seen[0][0]) == (0, 1024)
    caches("third")
    run = Run(mirror.working_copy(url))
    _, _, whole = train_toy("whole", duration=2048, no_picture=True)
    theirs = load_state(whole.state_path, CONFIG, PRESET.hyper.lengths)
    ours = load_state(run.state_path, CONFIG, PRESET.hyper.lengths)
    assert all(np.array_equal(ours.params[name], theirs.params[name]) for name in theirs.params)


def test_a_working_copy_with_a_later_state_is_not_thrown_away(memory, caches):
    url = "memory://bucket/run"
    train(url, duration=512)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mirror.Mirror, "_copy", lambda _: None)  # as if the network were down
        train(url, duration=1024)
    _, trainer = train(url, duration=1536)
    assert trainer.seen[0][0] == 1024


def test_the_index_comes_after_the_shards_and_goes_before_them(memory, monkeypatch):
    order, put, rm = [], type(memory).put_file, type(memory).rm_file

    def put_file(system, source, target, **_):
        order.append(("+", target))
        put(system, source, target)

    def rm_file(system, path):
        order.append(("-", path))
        rm(system, path)

    monkeypatch.setattr(type(memory), "put_file", put_file)
    monkeypatch.setattr(type(memory), "rm_file", rm_file)
    train("memory://bucket/run", duration=512, checkpoint=256, status=64)
    for sign in "+-":
        names = [path.rpartition("/")[2] for s, path in order if s == sign and "000000000256" in path]
        expected = ["state-00001-of-00001.safetensors", states.INDEX]
        assert names in (expected if sign == "+" else expected[::-1], [])
    assert any(s == "+" and path.endswith(states.INDEX) for s, path in order)


def test_a_copy_that_fails_is_tried_again_and_at_the_end_said(memory, monkeypatch, capsys, caplog):
    put, failures = type(memory).put_file, []

    def failing(self, source, target, **options):
        if len(failures) < 3:
            failures.append(target)
            raise OSError("connection reset")
        return put(self, source, target, **options)

    monkeypatch.setattr(type(memory), "put_file", failing)
    train("memory://bucket/run", duration=4096, status=64)
    assert "connection reset'" in caplog.text
    assert copied(memory, "/bucket/run") == here(mirror.folder_of("memory://bucket/run"))
    monkeypatch.setattr(type(memory), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(InputError, match=r"memory://bucket/two must be .* got 'gone'.*; the run is in .*two"):
        train("memory://bucket/two", duration=128)


def test_networks_averages_and_data_are_read_from_urls(memory, tmp_path, capsys):
    url = "memory://bucket/run"
    train(url, duration=4096)
    assert open_network(url, sigma_rel=0.07).snapshot.nimg == 4096
    assert len(open_sources(f"{url}/snapshots")) == 8
    snapshot = min(name for name in copied(memory, "/bucket/run") if name.startswith("snapshots/"))
    assert open_network(f"{url}/{snapshot}").snapshot.nimg == 1024
    assert edm2(["reconstruct", url, "--sigma-rels", "0.07", "--outdir", "made"]) == 0
    assert edm2(["report", url, "--outdir", "page"]) == 0
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.fromarray(np.full((8, 8, 3), index * 40, np.uint8)).save(tmp_path / f"pictures/{index}.png")
    memory.put(str(tmp_path / "pictures"), "/bucket/pictures", recursive=True)
    data = open_dataset("memory://bucket/pictures")
    assert data.read(np.arange(3))[:, 0, 0, 0].tolist() == [0, 40, 80]


def test_what_is_unchanged_is_copied_once_and_what_is_gone_goes(memory, monkeypatch):
    memory.pipe({"/bucket/data/a.npy": b"one", "/bucket/data/b/c.npy": b"two"})
    fetched, get = [], type(memory).get_file
    monkeypatch.setattr(type(memory), "get_file", lambda s, a, b, **k: (fetched.append(a), get(s, a, b, **k))[1])
    folder = remote.local("memory://bucket/data")
    assert here(folder) == {"a.npy": b"one", "b/c.npy": b"two"}
    assert remote.local(Path("memory://bucket/data")) == folder  # a Path has lost a slash
    assert len(fetched) == 2
    memory.pipe("/bucket/data/a.npy", b"other")
    memory.rm("/bucket/data/b/c.npy")
    assert here(remote.local("memory://bucket/data")) == {"a.npy": b"other"}
    assert len(fetched) == 3


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://bucket/nothing", "must be a file or folder, got nothing there"),
        ("nosuch://bucket/x", "must begin with a scheme of fsspec, .*Protocol not known: nosuch': correct it"),
        ("hf://user", "a repository of the hub must be hf://user/name, got hf://user"),
    ],
)
def test_what_cannot_be_read_is_one_line(memory, url, says):
    with pytest.raises(InputError, match=says) as error:
        open_network(url)
    assert "\n" not in str(error.value)


def test_names_that_would_leave_the_folder_are_refused():
    class System:
        def find(self, root, detail):
            return {f"{root}/../../evil": {"size": 1, "type": "file"}}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "open_system", lambda url: (System(), "/bucket/data"))
        with pytest.raises(InputError, match=r"names of files must lie in their folder, got '\.\./\.\./evil'"):
            remote.local("memory://bucket/data")


def test_a_repository_of_the_hub_is_read_by_its_package(tmp_path, monkeypatch):
    _, _, run = train_toy("run", duration=1024)
    asked = []

    def folder(repo, patterns, /, **_):
        asked.append((repo, patterns))
        return run.path

    monkeypatch.setattr(hub, "hub_folder", folder)
    assert open_network("hf://user/name").snapshot.nimg == 1024
    name = min(path.name for path in run.snapshots_path.iterdir())
    assert open_network(Path(f"hf://user/name/snapshots/{name}")).snapshot.nimg == 1024
    assert asked == [("user/name", ["*"]), ("user/name", [f"snapshots/{name}", f"snapshots/{name}/*"])]


@pytest.fixture
def server(tmp_path):
    """The address of a server of FTP, and the folder that it serves."""
    authorizers = pytest.importorskip("pyftpdlib.authorizers", reason="pyftpdlib is not installed")
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import FTPServer

    folder = tmp_path / "served"
    folder.mkdir()
    authorizer = authorizers.DummyAuthorizer()
    authorizer.add_user("edm2", "word", str(folder), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    running = FTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"timeout": 0.05}, daemon=True)
    thread.start()
    yield f"ftp://edm2:word@127.0.0.1:{running.address[1]}", folder
    running.close_all()


def test_a_run_on_a_server_goes_on_on_another_host(server, caches):
    address, folder = server
    train(f"{address}/run", duration=512, checkpoint=256, status=128)
    assert here(folder / "run") == here(mirror.folder_of(f"{address}/run"))
    caches("second")
    _, trainer = train(f"{address}/run", duration=1024)
    assert trainer.seen[0][0] == 512
    assert json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])["nimg"] == 1024
    _, _, whole = train_toy("whole", duration=1024, no_picture=True)
    ours, theirs = (load_state(run.state_path, CONFIG, PRESET.hyper.lengths) for run in (Run(folder / "run"), whole))
    assert all(np.array_equal(ours.params[name], theirs.params[name]) for name in theirs.params)


@pytest.mark.parametrize(
    "words", ["sample --outdir s3://bucket/x", "evaluate --save s3://bucket/x", "plan --out s3://b/x"]
)
def test_what_is_written_elsewhere_than_by_training_must_be_local(words, capsys, tmp_path):
    name, *options = words.split()
    if name == "sample":
        with pytest.raises(InputError, match="--outdir must be local, got s3://bucket/x"):
            options_of(SampleOptions, outdir="s3://bucket/x")
    else:
        assert edm2([name, *options]) == 2
        assert f"{options[0]} must be local, got s3://b" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_url_survives_being_a_path():
    for url in ("s3://bucket/a/b", "file:///tmp/a", "memory://a"):
        assert remote.is_url(Path(url))
        assert remote.url_of(Path(url)) == remote.url_of(url) == url
    for path in ("/tmp/a", "runs/x", "C:/data", "a:b"):
        assert not remote.is_url(path)
