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
from edm2_core.errors import InputError
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


@pytest.mark.filterwarnings("ignore")  # those of diffusers
def test_diffusers_loads_samples_and_saves_it(tmp_path):
    """The same noise gives the image of this library's sampler, before and after diffusers saved it itself."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from backends.torch.api import load, sample
    from backends.torch.diffusers_pipeline import EDM2Pipeline, EDM2Scheduler

    store(tmp_path / "net.safetensors", data=DataFormat())
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    network, noise, classes = load(tmp_path / "net.safetensors", device="cpu"), torch.randn(2, 1, 8, 8), [3, 7]
    wanted = sample(network, noise, torch.eye(10)[classes], num_steps=4)
    pipeline = EDM2Pipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "again")
    again = EDM2Pipeline.from_pretrained(tmp_path / "again")
    for one in (pipeline, again):
        got = one(classes, latents=noise, num_inference_steps=4, output_type="latent").images
        assert torch.allclose(got, wanted, atol=1e-5, rtol=0)
    pictures = pipeline(classes, latents=noise, num_inference_steps=4).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 2
    as_array = pipeline(classes, latents=noise, num_inference_steps=4, output_type="np").images
    assert as_array.shape == (2, 8, 8, 1)
    assert 0 <= as_array.min() <= as_array.max() <= 1
    seeded = [
        pipeline(
            num_inference_steps=2, batch_size=3, output_type="pt", generator=torch.Generator().manual_seed(5)
        ).images
        for _ in range(2)
    ]
    assert seeded[0].shape == (3, 1, 8, 8)
    assert torch.equal(*seeded)
    seen = []

    def zeroed(_, step, sigma, values):
        seen.append((step, sigma))
        return {"latents": values["latents"] * 0}

    ended = pipeline(classes, num_inference_steps=2, output_type="latent", callback_on_step_end=zeroed).images
    assert [step for step, _ in seen] == [0, 1]
    assert not ended.any()
    scheduler, x = again.scheduler, noise
    scheduler.set_timesteps(4)
    x = noise * scheduler.init_noise_sigma
    assert len(scheduler) == len(scheduler.timesteps) == 7
    with torch.no_grad():
        for sigma in scheduler.timesteps:  # a loop of one's own
            denoised, _ = again.model(x, sigma.expand(2, 1, 1, 1), torch.eye(10)[classes])
            x = scheduler.step(denoised, sigma, x).prev_sample
    assert torch.allclose(x, wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="a trajectory must be of 7 steps, got one more"):
        scheduler.step(denoised, sigma, x)
    other = {"sigma_max": 20.0, "method": "euler"}
    again.scheduler = EDM2Scheduler.from_config(scheduler.config, **other)
    got = again(classes, latents=noise, num_inference_steps=4, output_type="latent").images
    assert torch.allclose(got, sample(network, noise, torch.eye(10)[classes], num_steps=4, **other), atol=1e-5, rtol=0)
    for words, message in (
        ({"output_type": "tensor"}, "output_type must be one of"),
        ({"class_labels": [10]}, "class_labels must be from 0 to 9, got"),
        ({"class_labels": [1, 2], "batch_size": 3}, "batch_size must be that of the labels or latents, 2, got 3"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(**words)


@pytest.mark.filterwarnings("ignore")
def test_diffusers_decodes_latents_by_an_autoencoder_that_is_given(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from backends.torch.diffusers_pipeline import EDM2Pipeline

    codec = Codec.standardizing(*SD_LATENTS, stored="moments", vae="stabilityai/sd-vae-ft-mse")
    store(tmp_path / "net.safetensors", replace(CONFIG, img_channels=4), DataFormat(codec=codec))
    assert main(["export", str(tmp_path / "net.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    pipeline = EDM2Pipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="latents must be decoded by an autoencoder, got none: give"):
        pipeline([1])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipeline = EDM2Pipeline.from_pretrained(tmp_path / "out", vae=vae)
    words = {"num_inference_steps": 2, "latents": torch.randn(1, 4, 8, 8)}
    latent = pipeline([1], output_type="latent", **words).images
    wanted = (vae.decode(codec.decode(latent)).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipeline([1], output_type="pt", **words).images, wanted, atol=1e-5)
