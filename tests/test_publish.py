"""edm2 publish, and hf:// addresses: against a server that answers as the hub does."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_runs import ADDRESS, make_run, snapshot
from hub_server import Repo
from PIL import Image
from toy_port import CONFIG, train_toy

from backends.commands.cli import main as edm2
from backends.pipeline.checkpoints.hub import publish
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot
from backends.pipeline.runs.evaluation import FIGURES, append_figures
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.model_card import Card, card_text
from backends.pipeline.runs.networks import open_network
from backends.pipeline.runs.publishing import public_name
from edm2_core.codec import Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
pytestmark = pytest.mark.usefixtures("toy", "hub")


@pytest.fixture
def run():
    return make_run()


def files_of(hub, name="ada/digits"):
    return hub.repos["model", name].files


def published(source, *words, repo="ada/digits", licence=("--license", "mit")):
    return edm2(["publish", str(source), "--repo", repo, *licence, *words])


def test_a_run_is_one_commit_and_reads_back_bit_for_bit(hub, run, capsys):
    assert published(run.path) == 0
    history = hub.repos["model", "ada/digits"].history
    assert [message for _, message, _ in history] == ["initial commit", "Publish run with edm2"]
    names = {".gitattributes", "README.md", "config.json", "snapshots/0000004-0.050.safetensors"}
    assert files_of(hub).keys() == names | {"snapshots/0000004-0.100.safetensors"}
    assert f"published {hub.endpoint}/ada/digits\n" in capsys.readouterr().out
    for length in (0.05, 0.1, 0.07):
        there, here = (open_network(place, sigma_rel=length).snapshot for place in (ADDRESS, run.snapshots_path))
        if length != 0.07:  # which is reconstructed from two files there, and from eight here
            assert all(np.array_equal(there.params[name], here.params[name]) for name in here.params)
        assert (there.nimg, there.length) == (4096, Length.of(length))
    name = "snapshots/0000004-0.050.safetensors"
    assert (open_network(f"{ADDRESS}/{name}").snapshot.length, open_network(ADDRESS).folder.parts[0]) == (
        Length.of(0.05),
        "samples",
    )


def test_a_later_publication_replaces_the_earlier_and_keeps_other_files(hub, run):
    published(run.path, "--all")
    assert sum(name.endswith(".safetensors") for name in files_of(hub)) == 8
    hub.repos["model", "ada/digits"].commit("by hand", {**files_of(hub), "paper.pdf": b"%PDF"})
    sent = len(hub.uploads)
    assert published(run.path, "--sigma-rel", "0.1") == 0
    assert {name for name in files_of(hub) if name[0] in "sp"} == {"snapshots/0000004-0.100.safetensors", "paper.pdf"}
    assert len(hub.uploads) == sent  # it had arrived before
    assert published(run.path, "--sigma-rel", "0.07") == 0
    assert open_network(ADDRESS).snapshot.length == Length.of(0.07)


def test_an_upload_that_ends_half_way_changes_nothing_and_goes_on(hub, run, capsys):
    hub.failing = "/commit/"
    assert published(run.path) == 2
    assert "give the same command again: nothing is published yet" in capsys.readouterr().err
    assert files_of(hub).keys() == {".gitattributes"}
    sent, hub.failing = list(hub.uploads), None
    assert len(sent) == 2
    assert published(run.path) == 0
    assert hub.uploads == sent
    assert len(files_of(hub)) == 5


def test_a_commit_in_between_is_not_overwritten(hub, run, monkeypatch, capsys):
    published(run.path)
    repo, at = hub.repos["model", "ada/digits"], Repo.at

    def later(self, revision):
        found = at(self, revision)
        monkeypatch.setattr(Repo, "at", at)
        repo.commit("by another", {**repo.files, "x": b"x"})
        return found

    monkeypatch.setattr(Repo, "at", later)
    assert published(run.path, "--sigma-rel", "0.05") == 2
    assert "must not change while it is published to" in capsys.readouterr().err
    assert repo.history[-1][1] == "by another"


def test_the_card_tells_the_network_its_training_and_its_figures(hub, run, tmp_path):
    figure = {"metric": "fid", "extractor": "inception", "weights": "0123456789", "count": 64, "figures": {"fid": 3.25}}
    setting = {"nimg": 4096, "steps": 32, "guidance": "1.0", "reference": "/home/ada/secret"}
    append_figures(run.path / FIGURES, [figure | setting | {"length": 0.1}, figure | setting | {"length": 0.2}])
    (run.samples_path / "x").mkdir(parents=True)
    Image.new("L", (8, 8)).save(run.samples_path / "x" / "grid.png")
    assert published(run.path, "--private") == 0
    assert hub.repos["model", "ada/digits"].private
    text = files_of(hub)["README.md"].decode()
    card = hub.repos["model", "ada/digits"].card()
    assert (card["license"], card["library_name"]) == ("mit", "edm2")
    for part in ("| data | digits, 1797 samples |", "CONFIG G: ", "after 4096 images", "](samples/grid.png)", ADDRESS):
        assert part in text
    assert text.count("| fid | 3.25 | 64 | inception (01234567) | 0.1 | 32 | 1.0 |") == text.count("| fid |") == 1
    assert files_of(hub)["samples/grid.png"].startswith(b"\x89PNG")


def test_paths_of_this_machine_and_passwords_are_not_published(tmp_path, hub):
    data = tmp_path / "secret-folder" / "faces"
    data.mkdir(parents=True)
    for index in range(64):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(data / f"{index}.png")
    _, _, run = train_toy("run", duration=1024, data=str(data), unconditional=True, no_picture=True)
    assert published(run.path) == 0
    for content in files_of(hub).values():
        assert b"secret-folder" not in content
    assert json.loads(files_of(hub)["config.json"])["data"] == "faces"
    assert Run(open_network(ADDRESS).run.path).config().data == "faces"
    assert public_name("ftp://ada:word@host/data") == "ftp://host/data"
    assert (public_name("hf://datasets/a/b"), public_name("digits"), public_name(None)) == (
        "hf://datasets/a/b",
        "digits",
        None,
    )


def test_the_folder_of_an_autoencoder_becomes_its_name_and_no_weight_changes(hub, run):
    codec = Codec(stored="float32", mean=(0.0,), scale=(1.0,), vae="/home/ada/secret-folder/vae")
    for path in run.snapshots_path.iterdir():
        save_snapshot(path, replace(load_snapshot(path), data=DataFormat(codec=codec)))
    before = load_snapshot(run.snapshots_path / "0000004-0.100.safetensors")
    for words in ([], ["--sigma-rel", "0.07"]):
        assert published(run.path, *words) == 0
        assert not any(b"secret-folder" in content for content in files_of(hub).values())
        got = open_network(ADDRESS).snapshot
        assert got.data == DataFormat(codec=replace(codec, vae="vae"))
        if not words:
            assert all(np.array_equal(got.params[name], before.params[name]) for name in before.params)
    assert b"| output | latents of 8x8, 1 channel, of the autoencoder vae |" in files_of(hub)["README.md"]


def test_a_folder_in_the_layout_of_the_hub_is_written_and_read(run, tmp_path, hub):
    assert edm2(["publish", str(run.path), "--license", "mit", "--outdir", "made"]) == 0
    assert hub.requests == []
    assert open_network("made").snapshot.nimg == 4096
    published(run.path)
    for name, content in files_of(hub).items():
        if name.startswith("snap") or name == "config.json":
            assert Path("made", name).read_bytes() == content
    raw = snapshot(tmp_path / "net.safetensors")
    assert edm2(["publish", "net.safetensors", "--license", "mit", "--outdir", "one"]) == 0
    assert sorted(path.name for path in Path("one").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    read = open_network("one").snapshot
    assert all(np.array_equal(read.params[name], raw[name]) for name in raw)


def test_a_snapshot_of_a_run_is_published_with_what_is_known_of_the_run(hub, run):
    assert published(run.snapshots_path / "0000002-0.050.safetensors") == 0
    assert "snapshots/0000002-0.050.safetensors" in files_of(hub)
    assert b"| data | digits, 1797 samples |" in files_of(hub)["README.md"]
    assert open_network(ADDRESS).snapshot.nimg == 2048


def other(hub, **known):
    hub.repos["model", "ada/digits"] = Repo(**known)


@pytest.mark.parametrize(
    ("words", "prepare", "says"),
    [
        ("--repo ada/digits", None, "--license must be given to publish, got none: choose the network's, such as "),
        ("--license mit", None, "--repo must be user/name on the hub, got none: name one, or write a folder"),
        ("--license mit --repo digits", None, "a repository of the hub must be hf://user/name, got hf://digits"),
        ("--license mit --repo ada/digits/x", None, "--repo must be user/name, got ada/digits/x: correct it"),
        ("--license nonsense --repo ada/digits", None, 'Invalid metadata in README.md. - "license" must be one of'),
        ("--license mit --repo eve/digits", None, "eve/digits must be yours to write, got a refusal by the hub: "),
        ("--license mit --repo ada/digits", "no token", "a token of the hub must be set to publish, got none: hf auth"),
        ("--license mit --repo ada/digits", "bad token", "the token of the hub must be valid, got one that the hub re"),
        ("--license mit --repo ada/digits", "reads", "ada/digits must be yours to write, got a refusal by the hub: "),
        ("--license mit --repo ada/digits", "other", "got ada/digits, a name taken by something else: choose another"),
        ("--license mit --repo ada/digits --private", "empty", "got ada/digits, which is public: make it private"),
        (
            "--license mit --repo ada/digits",
            "offline",
            "the hub must answer, or ada/digits be in its cache, got 'HF_HUB_OFFLINE is set': write",
        ),
        ("--license mit --repo ada/digits", "down", "the hub must answer, or ada/digits be in its cache, got '"),
        ("--license mit --repo ada/digits --all --sigma-rel 0.1", None, "--sigma-rel and --all exclude each other"),
        (
            "--license mit --repo ada/digits --pictures x.jpg",
            None,
            "--pictures must be .png files that can be read, got x",
        ),
        (
            "--license mit --repo ada/digits --pictures run",
            None,
            "--pictures must be .png files that can be read, got run",
        ),
        ("--license mit --repo ada/digits --sigma-rel 0.001", None, "--sigma-rel must be a length that snapshots give"),
        ("--license mit --outdir run", None, "--outdir must be a new folder, got run, which exists: choose another"),
    ],
)
def test_what_cannot_be_published_is_one_line(hub, run, monkeypatch, capsys, words, prepare, says):
    match prepare:
        case "no token":
            monkeypatch.delenv("HF_TOKEN")
        case "bad token" | "reads":
            monkeypatch.setenv("HF_TOKEN", "hf_reads" if prepare == "reads" else "hf_mallory")
        case "other" | "empty":
            other(hub)
            if prepare == "other":
                hub.repos["model", "ada/digits"].commit("a model", {"pytorch_model.bin": b"x"})
        case "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case "down":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            monkeypatch.setattr("time.sleep", lambda _: None)
    before = {key: len(repo.history) for key, repo in hub.repos.items()}
    assert edm2(["publish", "run", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert all(len(hub.repos[key].history) == count for key, count in before.items())


def test_force_publishes_beside_the_files_of_something_else(hub, run):
    other(hub)
    hub.repos["model", "ada/digits"].commit("a model", {"model.safetensors": b"x", "notes.txt": b"y"})
    assert published(run.path, "--force") == 0
    assert files_of(hub)["notes.txt"] == b"y"
    assert open_network(ADDRESS).snapshot.nimg == 4096


def test_texts_of_others_do_not_break_the_table_of_a_card():
    config = replace(CONFIG)
    metadata = Snapshot(params={}, config=config, nimg=1, length=None)
    figure = {
        "metric": "m|\n# x",
        "extractor": "a|b",
        "count": 1,
        "figures": {"m|\n# x": 1.0},
        "nimg": 1,
        "length": None,
    }
    text = card_text(Card("hf://a/b", None, [metadata], figures=[figure]))
    assert "| m\\| # x | 1 | 1 | a\\|b |" in text
    assert "license" not in text


def test_publish_says_which_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"the hub's package must be installed, got none: pip install 'edm2\[hub\]'"):
        publish("a/b", {}, message="x")
