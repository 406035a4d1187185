"""hf:// addresses, wherever a network, a run or data are named: on a server that answers as the hub does."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hub_runs import ADDRESS, make_run, snapshot
from hub_server import Repo
from toy_port import CONFIG, train_toy

from backends.commands.cli import main as edm2
from backends.pipeline.checkpoints.autoencoder import local_folder
from backends.pipeline.checkpoints.hub import Address, named
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.networks import open_network
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
pytestmark = pytest.mark.usefixtures("toy", "hub")


@pytest.fixture
def run():
    return make_run()


def published(source, *words):
    return edm2(["publish", str(source), "--repo", "ada/digits", "--license", "mit", *words])


@pytest.mark.parametrize("framework", ["torch", "jax", "mlx"])
def test_every_port_loads_what_was_published(framework, tmp_path):
    pytest.importorskip(framework)
    api, weights = (import_module(f"backends.{framework}.{name}") for name in ("api", "weights"))
    wanted = snapshot(tmp_path / "net.safetensors")
    assert published(tmp_path / "net.safetensors") == 0
    network = api.load(ADDRESS)
    got = weights.dump(network.params if framework == "jax" else weights.tensors(network))
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("token", "url", "says"),
    [
        (
            "hf_bob",
            "hf://ada/digits",
            "ada/digits must be a repository that you may read, got none of this name that t",
        ),
        (
            None,
            "hf://ada/digits",
            "got none of this name that is public, and no token: correct the name, or, if it is ",
        ),
        ("hf_wrong", "hf://ada/digits", "the token of the hub must be valid, got one that the hub refuses: hf auth"),
        ("hf_bob", "hf://ada/gated", "ada/gated must be open to you, got a repository with conditions: accept them"),
        ("hf_ada", "hf://ada/digits/nothing", "ada/digits must have nothing, got no such file or folder there"),
        ("hf_ada", "hf://ada/digits@v2", "ada/digits must have the revision that was asked for, got none of this name"),
        ("hf_ada", "hf://ada/digits@", "a repository of the hub must be hf://user/name, got hf://ada/digits@"),
    ],
)
def test_what_cannot_be_read_is_one_line(hub, monkeypatch, tmp_path, token, url, says):
    hub.repos["model", "ada/digits"] = Repo(private=True)
    hub.repos["model", "ada/gated"] = Repo(gated=True)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError) as error:
        open_network(url)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_private_network_and_an_earlier_revision_are_read_with_their_token(hub, tmp_path):
    first = snapshot("one.safetensors", seed=1)
    published("one.safetensors", "--private")
    commit = hub.repos["model", "ada/digits"].history[-1][0]
    second = snapshot("two.safetensors", seed=2)
    published("two.safetensors")
    name = "unet.out_conv.weight"
    assert np.array_equal(open_network(ADDRESS).snapshot.params[name], second[name])
    assert np.array_equal(open_network(f"{ADDRESS}@{commit}").snapshot.params[name], first[name])


def test_without_a_connection_the_cache_is_read(hub, run, tmp_path):
    """In a process of its own, which reads the hub's settings from the environment."""
    published(run.path)
    assert open_network(ADDRESS).snapshot.nimg == 4096
    hub.close()
    program = (
        "from backends.pipeline.runs.networks import open_network as o; print(o('hf://ada/digits').snapshot.nimg)\n"
        "try: o('hf://ada/other')\nexcept ValueError as error: print(error)"
    )
    known = {"HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | known, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "4096", done.stderr
    assert lines[1].startswith("the hub must answer, or ada/other be in its cache, got ")


def test_every_command_takes_an_address_and_writes_nothing_into_the_cache(hub, run, tmp_path, capsys):
    published(run.path, "--all")
    open_network(ADDRESS)
    cached = sorted(Path("hf").rglob("*"))
    measure = ["--metric", "frechet@pixels", "--seeds", "0-3", "--steps", "2", "--reference", "digits"]
    for words in (
        ["reconstruct", ADDRESS, "--sigma-rels", "0.07"],
        ["ema-plot", ADDRESS],
        ["report", ADDRESS, "--no-samples"],
        ["export", ADDRESS, "exported", "--sigma-rel", "0.05"],
        ["publish", ADDRESS, "--outdir", "again", "--license", "mit"],
        ["evaluate", "--run", ADDRESS, "--port", "torch", "--device", "cpu", *measure],
    ):
        assert edm2(words) == 0, capsys.readouterr().err
    assert sorted(Path("hf").rglob("*")) == cached
    assert Path("reconstructed/0000004-0.070.safetensors").is_file()
    assert Path("report/report.html").is_file()
    (figures,) = Path("measured").glob("*/figures.jsonl")
    assert json.loads(figures.read_text())["nimg"] == 4096


def test_a_network_of_torch_goes_to_the_hub_and_comes_back(hub, tmp_path):
    torch = pytest.importorskip("torch")
    from backends.torch.api import Network

    network = Network(CONFIG)
    network.format = DataFormat(classes=tuple("abcdefghij"))
    assert network.push_to_hub("ada/mine", license="mit", private=True) == f"{hub.endpoint}/ada/mine"
    network.save_pretrained(tmp_path / "saved")
    assert (hub.repos["model", "ada/mine"].private, hub.repos["model", "ada/mine"].card()["license"]) == (True, "mit")
    for name in ("ada/mine", "hf://ada/mine", tmp_path / "saved"):
        got = Network.from_pretrained(name, device="cpu")
        assert (got.config, got.format, got.training) == (CONFIG, network.format, False)
        assert all(torch.equal(tensor, got.state_dict()[key]) for key, tensor in network.state_dict().items())
    with torch.no_grad():
        network.unet.out_gain.fill_(2.0)
    first = hub.repos["model", "ada/mine"].history[-1][0]
    network.push_to_hub("ada/mine")
    gains = [
        float(Network.from_pretrained("ada/mine", revision=r, device="cpu").unet.out_gain.detach())
        for r in (first, None)
    ]
    assert gains == [0.0, 2.0]


def test_a_folder_is_saved_and_loaded_without_the_package_of_the_hub(tmp_path):
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import backends.torch.ema; assert not {'tyro', 'PIL', 'matplotlib'} & sys.modules.keys()\n"
        "from backends.torch.api import Network\nfrom toy_port import CONFIG\n"
        "Network(CONFIG).save_pretrained('saved'); print(Network.from_pretrained('saved', device='cpu').label_dim)\n"
        "try: Network.from_pretrained('ada/digits')\nexcept ValueError as error: print(error)"
    )
    pytest.importorskip("torch")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "10", done.stderr
    assert lines[1].endswith("give a local path, or pip install 'edm2[hub]'")


def test_training_starts_from_an_address_and_takes_data_from_one(hub, tmp_path):
    snapshot("net.safetensors")
    published("net.safetensors")
    images = np.zeros((64, 1, 8, 8), np.float32) + np.arange(64, dtype=np.float32)[:, None, None, None]
    np.save("array.npy", images)
    hub.repos["dataset", "ada/set"] = Repo()
    hub.repos["dataset", "ada/set"].commit("data", {"array.npy": Path("array.npy").read_bytes()})
    url = "hf://datasets/ada/set/array.npy"
    data = open_dataset(url)
    assert (data.spec, data.name, len(data)) == (url, "array", 64)
    _, trainer, run = train_toy("run", init=ADDRESS, data=url, unconditional=True, duration=64, no_picture=True)
    assert (run.config().data, run.config().init) == (url, ADDRESS)
    assert trainer.seen == [(0, (64, 1, 8, 8), None)]


def test_an_autoencoder_is_named_by_an_address(hub, tmp_path):
    hub.repos["model", "ada/vae"] = Repo()
    files = {"inner/config.json": b"{}", "inner/diffusion_pytorch_model.safetensors": b"x", "big.bin": b"y"}
    hub.repos["model", "ada/vae"].commit("vae", files)
    folder = local_folder("hf://ada/vae/inner")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert not list(Path("hf").rglob("big.bin"))


def test_addresses():
    assert Address.of("hf://a/b") == Address("a/b")
    assert Address.of("hf:/datasets/a/b@refs%2Fpr%2F1/c/d.npy".replace(":/", "://")) == Address(
        "a/b", "c/d.npy", "refs/pr/1", "dataset"
    )
    assert (named("a/b"), named("hf://a/b")) == ("a/b", "a/b")
