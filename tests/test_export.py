"""edm2 export: a folder without a pickle, which edm2 reads again, and what the official tools need."""

import json
import pickle
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from toy_port import CONFIG

from backends.commands.cli import main
from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot
from backends.pipeline.runs.networks import stored_network
from edm2_core.codec import SD_LATENTS, Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.ladder import LADDER
from edm2_core.network import NetworkConfig, initialize


def store(path, config=CONFIG, data=None):
    params = initialize(config, seed=1)
    snapshot = Snapshot(params=params, config=config, nimg=2048, length=Length.of(0.1), data=data)
    save_snapshot(path, snapshot, dtype="float32")
    return params


def test_a_folder_is_read_again_as_a_network(tmp_path, capsys):
    params = store(tmp_path / "net.safetensors", data=DataFormat(classes=("a",) * 10))
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "network.json"]
    read = stored_network(tmp_path / "out")
    assert (read.config, read.nimg, read.length) == (CONFIG, 2048, Length.of(0.1))
    assert read.data.classes == ("a",) * 10
    assert all(np.array_equal(read.params[name], np.asarray(array, np.float32)) for name, array in params.items())
    described = json.loads((tmp_path / "out" / "network.json").read_text())
    assert NetworkConfig(**described["network"]) == CONFIG
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out")]) == 2
    assert "dest must be a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("latent", [False, True])
def test_the_script_makes_the_official_content_of_the_official_classes(tmp_path, monkeypatch, latent):
    """With stand-ins for the official classes, which keep what they are given."""
    torch = pytest.importorskip("torch")
    config = replace(CONFIG, img_channels=4) if latent else CONFIG
    codec = Codec.standardizing(*SD_LATENTS, stored="moments", vae="stabilityai/sd-vae-ft-mse")
    params = store(tmp_path / "net.safetensors", config, DataFormat(codec=codec) if latent else None)
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out"), "--to", "official"]) == 0
    script = tmp_path / "out" / "make_pickle.py"
    assert len(script.read_text().splitlines()) <= 10
    networks, encoders = types.ModuleType("training.networks_edm2"), types.ModuleType("training.encoders")
    seen = {}

    class Precond:
        def __init__(self, *args, **kwargs):
            seen["net"] = args, kwargs

        def load_state_dict(self, state):
            seen["state"] = state

        def eval(self):
            return self

        def requires_grad_(self, _):
            return "the network"

    for name in ("StandardRGBEncoder", "StabilityVAEEncoder"):
        setattr(encoders, name, lambda name=name, **kwargs: (name, kwargs))
    networks.Precond = Precond
    modules = {"training": types.ModuleType("training")}
    modules |= {"training.networks_edm2": networks, "training.encoders": encoders}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(script.read_text(), str(script), "exec"), {"__file__": str(script)})
    content = pickle.loads((tmp_path / "out" / "network.pkl").read_bytes())
    assert content["ema"] == "the network"
    assert seen["net"][0] == (8, config.img_channels, 10)
    assert seen["net"][1]["model_channels"] == CONFIG.model_channels
    assert seen["state"].keys() == params.keys()
    assert torch.equal(seen["state"]["unet.out_conv.weight"], torch.from_numpy(params["unet.out_conv.weight"]))
    name, given = content["encoder"]
    if not latent:
        assert (name, given) == ("StandardRGBEncoder", {})
    else:
        assert name == "StabilityVAEEncoder"
        assert given["raw_mean"] == pytest.approx(SD_LATENTS[0])
        assert given["raw_std"] == pytest.approx(SD_LATENTS[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"switches": LADDER["D"]}, "must have CONFIG G, got CONFIG D"),
        ({"img_resolution": (8, 16)}, r"must have square images, got \(8, 16\)"),
        ({"cond_channels": 1}, "must have no cond_channels, got 1"),
    ],
)
def test_what_the_official_network_cannot_be_is_refused(tmp_path, capsys, change, message):
    store(tmp_path / "net.safetensors", replace(CONFIG, **change))
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out"), "--to", "official"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()
