"""The sample command: which network, one image per seed whatever the batch, and the files written."""

from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_port import CONFIG, ToySampler, config_of, options_of

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.data.seeds import labels as seed_labels
from backends.pipeline.data.seeds import noise
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import SampleOptions
from backends.pipeline.runs.sampling import run_sampling
from backends.pipeline.runs.team import Team
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize
from edm2_core.published import published

PROG = "python -m backends.toy.sample"
UNCONDITIONAL = replace(CONFIG, label_dim=0)

pytestmark = pytest.mark.usefixtures("toy")


def store(path, config=CONFIG, *, seed=0, nimg=1024, sigma_rel=0.1):
    length = Length.of(sigma_rel)
    save_snapshot(path, Snapshot(params=initialize(config, seed=seed), config=config, nimg=nimg, length=length))


@pytest.fixture
def run():
    """A run with averages of two lengths at three times, each a network of its own."""
    made = Run("runs/00000-digits")
    made.save_config(config_of(preset="toy", data="digits"))
    for i, nimg in enumerate((1024, 2048, 3072)):
        for j, sigma_rel in enumerate((0.05, 0.10)):
            path = made.snapshots_path / snapshot_name(nimg, Length.of(sigma_rel))
            store(path, seed=2 * i + j, nimg=nimg, sigma_rel=sigma_rel)
    return made


def sample(**options):
    sampler = ToySampler()
    run_sampling(options_of(SampleOptions, **options), sampler, prog=PROG)
    return sampler.calls


def npz(**options):
    sample(format="npz", outdir=Run("out").path, **options)
    with np.load("out/samples.npz") as file:
        return dict(file)


def used(seed, name="unet.out_conv.weight"):
    return pytest.approx(np.mean(initialize(CONFIG, seed=seed)[name]), abs=1e-4)


def test_by_default_it_samples_64_seeds_from_the_newest_run_s_last_average(run, capsys):
    calls = sample()
    assert len(calls) == 1
    assert (calls[0]["n"], calls[0]["mean"], calls[0]["num_steps"]) == (64, used(5), 32)
    assert (calls[0]["guidance"], calls[0]["guide"]) == (1.0, None)
    folder = run.samples_path / "0000003-0.100"
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"{seed:06d}.png" for seed in range(64)),
        "grid.png",
        "samples.json",
    ]
    out = capsys.readouterr().out
    assert "network  runs/00000-digits (stored): 0.01 M parameters, sigma_rel 0.1, after 3072 images" in out
    assert "wrote    runs/00000-digits/samples/0000003-0.100/grid.png" in out


def test_a_length_that_is_stored_is_used_as_it_is(run):
    assert sample(sigma_rel=0.05, seeds="0")[0]["mean"] == used(4)


def test_a_length_that_is_not_stored_is_reconstructed_on_the_fly(run, capsys):
    sample(sigma_rel=0.07, seeds="0")
    assert "(reconstructed from 6 snapshots, predicted error " in capsys.readouterr().out
    assert (run.samples_path / "0000003-0.070/grid.png").exists()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07], ids=["stored", "reconstructed"])
def test_each_snapshot_is_opened_once(run, headers_read, sigma_rel):
    sample(sigma_rel=sigma_rel, seeds="0")
    assert sorted(headers_read) == sorted(run.snapshots_path.iterdir())


def test_0_10_is_the_default_even_where_longer_ones_are_kept(run):
    store(run.snapshots_path / "x.safetensors", seed=9, nimg=3072, sigma_rel=0.2)
    assert sample(seeds="0")[0]["mean"] == used(5)


def test_without_0_10_the_longest_average_is_the_default(run):
    for path in run.snapshots_path.glob("*-0.100*"):
        path.unlink()
    store(run.snapshots_path / "x.safetensors", seed=9, nimg=3072, sigma_rel=0.2)
    assert sample(seeds="0")[0]["mean"] == used(9)


def test_an_image_depends_on_its_seed_and_not_on_the_batch_or_its_neighbours(run):
    settings = {"S_churn": 20.0, "guidance": 2.0, "guide": run.path}
    whole = npz(seeds="0-12", batch=64, **settings)
    for seeds, batch in [("0-12", 1), ("0-12", 5), ("12,3,7", 2)]:
        part = npz(seeds=seeds, batch=batch, **settings)
        assert np.array_equal(part["images"], whole["images"][part["seeds"]])
        assert np.array_equal(part["labels"], whole["labels"][part["seeds"]])


def test_a_batch_is_at_most_as_large_as_asked(run):
    assert [call["n"] for call in sample(seeds="0-12", batch=5)] == [5, 5, 3]


def test_npz_holds_images_labels_and_seeds(run):
    arrays = npz(seeds="5,2,9")
    assert (arrays["images"].dtype, arrays["images"].shape) == (np.uint8, (3, 8, 8, 1))
    assert (arrays["labels"].dtype, arrays["seeds"].dtype) == (np.int64, np.int64)
    assert arrays["seeds"].tolist() == [5, 2, 9]
    assert arrays["labels"].tolist() == seed_labels([5, 2, 9], 10).tolist()
    hue = 0.1 * arrays["labels"][:, None, None, None] / 10
    mean = np.mean(initialize(CONFIG, seed=5)["unet.out_conv.weight"].astype(np.float16), dtype=np.float32)
    wanted = 127.5 + 127.5 * (np.tanh(noise([5, 2, 9], (1, 8, 8)) + mean) * 0.8 + hue)
    assert np.abs(arrays["images"].transpose(0, 3, 1, 2) - wanted).max() <= 0.51


def test_a_png_is_the_same_image_as_in_the_npz(run):
    arrays = npz(seeds="7")
    sample(seeds="7", outdir=Run("png").path)
    with Image.open("png/000007.png") as image:
        assert np.array_equal(np.asarray(image), arrays["images"][0, :, :, 0])


def test_class_makes_all_images_of_one_class(run):
    arrays = npz(seeds="0-4", label=3)
    assert arrays["labels"].tolist() == [3] * 5


def test_classes_are_named_in_a_list_or_all_in_turn(run):
    assert npz(seeds="5-9", label="3,7")["labels"].tolist() == [3, 7, 3, 7, 3]
    assert npz(seeds="0-11", label="all")["labels"].tolist() == [*range(10), 0, 1]


def test_labels_come_from_a_file(run):
    np.save("ids.npy", np.array([4, 2]))
    assert npz(seeds="7-9", labels=Run("ids.npy").path)["labels"].tolist() == [4, 2, 4]
    vectors = np.eye(10, dtype=np.float32)[::-1]
    np.save("vectors.npy", vectors)
    assert np.array_equal(npz(seeds="7-9", labels=Run("vectors.npy").path)["labels"], vectors[:3])


def test_what_is_there_is_not_made_again(run):
    sample(seeds="0-7", batch=4, outdir="out", subdirs=True)
    folder, first = Run("out/000000").path, Run("out/000000/000003.png").path.read_bytes()
    (folder / "000005.png").unlink()
    calls = sample(seeds="0-9", batch=4, outdir="out", subdirs=True, skip_existing=True)
    assert [call["n"] for call in calls] == [4, 2]  # seeds 4 to 7, of which one was missing, and 8 and 9
    assert len(list(folder.glob("*.png"))) == 10
    assert (folder / "000003.png").read_bytes() == first
    sample(seeds="0-9", outdir="anew", subdirs=True)
    assert Run("out/grid.png").path.read_bytes() == Run("anew/grid.png").path.read_bytes()


def test_processes_divide_the_batches_and_make_what_one_makes(run):
    sample(seeds="0-9", outdir="whole")
    for rank in range(3):
        team = Team(rank, 3, lambda data: np.stack([data] * 3))
        options = options_of(SampleOptions, seeds="0-9", outdir=Run("parts").path, batch=2)
        run_sampling(options, ToySampler(), prog=PROG, team=team)
    whole, parts = ({p.name: p.read_bytes() for p in Run(n).path.glob("0*.png")} for n in ("whole", "parts"))
    assert (whole, len(whole)) == (parts, 10)


def test_noise_of_torch_is_that_of_its_generator(run):
    torch = pytest.importorskip("torch")
    arrays = npz(seeds="3,4294967299", noise="torch")
    generator = torch.Generator().manual_seed(3)
    start = torch.randn([1, 8, 8], generator=generator).numpy()
    label = int(torch.randint(10, [], generator=generator))
    mean = np.mean(initialize(CONFIG, seed=5)["unet.out_conv.weight"].astype(np.float16), dtype=np.float32)
    wanted = 127.5 + 127.5 * (np.tanh(start + mean) * 0.8 + 0.1 * label / 10)
    assert arrays["labels"].tolist() == [label] * 2  # seeds count modulo 2^32
    assert np.abs(arrays["images"].transpose(0, 3, 1, 2) - wanted).max() <= 0.51


def test_each_file_of_an_array_is_written_part_by_part(run):
    sample(seeds="0-6", batch=3, outdir="out", format="npy")
    assert np.array_equal(np.load("out/samples.npy"), npz(seeds="0-6")["images"].transpose(0, 3, 1, 2))
    sample(seeds="0-6", batch=3, outdir="out", format="latents")
    with np.load("out/latents.npz") as file:
        assert (file["latents"].shape, file["labels"].shape, file["seeds"].tolist()) == (
            (7, 1, 8, 8),
            (7,),
            [*range(7)],
        )


def test_a_guide_has_an_average_of_its_own(run):
    (call,) = sample(seeds="0", guidance=2.0, guide=run.path, guide_sigma_rel=0.05)
    assert np.mean(call["guide"][1]["unet.out_conv.weight"]) == used(4)


def test_a_published_combination_names_network_guide_and_weight(run, capsys):
    names = published("edm2-img64-s-autog-fid")
    store(f"models/{names.net.replace('.pkl', '.safetensors')}", seed=7)
    store(f"models/{names.guide.replace('.pkl', '.safetensors')}", seed=8)
    (call,) = sample(preset="edm2-img64-s-autog-fid", models="models", seeds="0")
    assert (call["mean"], call["guidance"]) == (used(7), 1.7)
    assert np.mean(call["guide"][1]["unet.out_conv.weight"]) == used(8)
    assert "published fid 1.01 of 50000 images" in capsys.readouterr().out


def test_published_networks_come_from_a_repository_of_the_hub(run, monkeypatch):
    """From the hub's cache, as its package lays it out."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    repo = Path("hub", "models--someone--edm2")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    names, folder = published("edm2-img64-s-autog-fid"), repo / "snapshots" / ("0" * 40)
    store(str(folder / names.net.replace(".pkl", ".safetensors")), seed=7)
    options = {"preset": "edm2-img64-s-autog-fid", "models": "hf://someone/edm2", "seeds": "0"}
    with pytest.raises(InputError, match=f"--models must have {names.guide}, got none in hf://someone/edm2: download"):
        sample(**options)
    store(str(folder / names.guide.replace(".pkl", ".safetensors")), seed=8)
    assert sample(**options)[0]["mean"] == used(7)


def test_an_unconditional_network_gets_no_labels_and_says_minus_one():
    store("net", UNCONDITIONAL)
    assert npz(net="net", seeds="0-1")["labels"].tolist() == [-1, -1]
    assert sample(net="net", seeds="0")[0]["labels"] is None


def test_net_samples_that_file_into_samples_here(capsys):
    store("net", seed=3)
    assert sample(net="net", seeds="0")[0]["mean"] == used(3)
    assert "network  net: " in capsys.readouterr().out
    assert Run("samples/grid.png").path.exists()


def test_guidance_without_a_guide_is_by_the_same_network_without_its_label(capsys):
    store("net", replace(CONFIG, label_dropout=0.1))
    (call,) = sample(net="net", seeds="0", guidance=1.5)
    assert (call["guidance"], call["guide"]) == (1.5, None)
    assert "the same network without its label, weight 1.5" in capsys.readouterr().out
    assert Run("samples-guidance1.5/grid.png").path.exists()


def test_a_network_never_trained_without_its_label_does_not_guide_itself(run):
    with pytest.raises(InputError, match=r"got label_dropout 0: .*--unconditional, then --guide.*--label-dropout 0\.1"):
        sample(seeds="0", guidance=2.0)
    assert not run.samples_path.exists()
    (call,) = sample(seeds="0", label=3)
    assert call["labels"].argmax() == 3


def test_a_run_guides_with_its_usual_average(run):
    (call,) = sample(run=run.path, seeds="0", guidance=2.0, guide=run.path, sigma_rel=0.05)
    config, params = call["guide"]
    assert config == CONFIG
    assert np.mean(params["unet.out_conv.weight"]) == used(5)  # 0.10, the last


def test_a_guide_is_handed_to_the_sampler(run, capsys):
    store("guide", UNCONDITIONAL, seed=8)
    (call,) = sample(seeds="0", guidance=2.0, guide="guide", guide_interval=(0.2, 5.0))
    config, params = call["guide"]
    assert config == UNCONDITIONAL
    assert np.array_equal(params["unet.out_gain"], initialize(UNCONDITIONAL, seed=8)["unet.out_gain"])
    assert call["guide_interval"] == (0.2, 5.0)
    assert "guide    guide, weight 2" in capsys.readouterr().out


def test_images_of_other_settings_are_not_mixed_into_a_folder(run):
    sample(seeds="0-7", outdir="out")
    first = {path.name: path.read_bytes() for path in Run("out").path.glob("0*.png")}
    with pytest.raises(InputError, match="images in out must all have the same settings, got class 1 for None"):
        sample(seeds="0-3", outdir="out", label=1)
    with pytest.raises(InputError, match="got steps 4 for 32"):
        sample(seeds="0-3", outdir="out", steps=4)
    with pytest.raises(InputError, match="got network"):
        sample(seeds="0-3", outdir="out", sigma_rel=0.05)
    assert {path.name: path.read_bytes() for path in Run("out").path.glob("0*.png")} == first
    sample(seeds="8-9", outdir="out")  # the same settings: they belong together
    assert len(list(Run("out").path.glob("0*.png"))) == 10
    sample(seeds="0", label=1, steps=4)
    sample(seeds="0", S_churn=3.0)
    names = sorted(path.name for path in run.samples_path.iterdir())
    assert names[1] == "0000003-0.100-class1-steps4"
    assert len(names) == 2
    Run("out/samples.json").path.unlink()
    with pytest.raises(InputError, match=r"out must have no images of unknown settings, got 00000\d\.png"):
        sample(seeds="0-7", outdir="out")


def test_solver_options_are_passed_on(run):
    given = {
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "rho": 5.0,
        "S_churn": 3.0,
        "S_min": 0.1,
        "S_max": 9.0,
        "S_noise": 1.1,
    }
    (call,) = sample(seeds="0", steps=8, **given)
    assert {name: call[name] for name in given} == given
    assert call["num_steps"] == 8
    (call,) = sample(seeds="0")
    defaults = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "S_churn": 0, "S_min": 0, "S_max": inf, "S_noise": 1}
    assert {name: call[name] for name in given} == defaults


def test_a_grid_shows_at_most_100_images(run):
    sample(seeds="0-119")
    with Image.open(run.samples_path / "0000003-0.100/grid.png") as grid:
        assert 10 * 48 < grid.height < 11 * 52
    assert (run.samples_path / "0000003-0.100/000119.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "a"}, "seeds must be numbers and ranges"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"label": 10}, "--class must be from 0 to 9 or all, got 10"),
        ({"label": -1}, "--class must be from 0 to 9 or all, got -1"),
        ({"sigma_rel": 0.3}, r"sigma_rel must be within \(0, 0\.2887\), got 0\.3"),
        ({"sigma_rel": 0.0}, r"sigma_rel must be within \(0, 0\.2887\), got 0"),
        ({"steps": 0}, "num_steps >= 1.*got num_steps 0"),
        ({"sigma_min": 90.0}, "0 < sigma_min < sigma_max"),
        ({"rho": 0.0}, "rho > 0"),
        ({"S_churn": -1.0}, "--S-churn must not be negative, got -1"),
        ({"net": "net", "run": "runs/00000-digits"}, "--net and --run name the same thing, got both"),
        ({"net": "net", "sigma_rel": 0.1}, "a single snapshot has one length, got sigma_rel 0.1 for net"),
        ({"net": "none"}, "none must be a file that can be read"),
        ({"run": "none"}, r"must be a folder with a config\.json, got none"),
        ({"guide": "net"}, "--guide needs a guidance weight"),
        ({"guide": "wide", "guidance": 2.0}, "--guide must make images of the same shape, got img_resolution 16 for 8"),
        ({"guide": "other", "guidance": 2.0}, "--guide must have no classes or 10, got 3"),
        ({"net": "free", "guidance": 2.0}, "--guidance of a network without labels needs a guide"),
        ({"net": "free", "label": 3}, "--class needs a network with labels, got 3"),
        ({"net": "latent"}, "PNG images must be grey or RGB, got 4 channels: use --format npz"),
        ({"net": "theirs"}, "must be one of edm2's"),
        ({"label": "3,x"}, "--class must be from 0 to 9 or all, got x"),
        ({"label": "3", "labels": "ids.npy"}, "--class and --labels exclude each other"),
        ({"labels": "ids.npy"}, "--labels must be from 0 to 9, got 0 to 10 in ids.npy"),
        ({"labels": "rows.npy"}, r"--labels must be class ids \[n\] or vectors \[n, 10\], got \[4, 3\]"),
        ({"guide_sigma_rel": 0.1}, "--guide-sigma-rel needs a --guide"),
        ({"preset": "edm2-img512-q-fid"}, "--preset must be one of edm2-img512-xs-fid"),
        ({"preset": "edm2-img512-s-fid", "net": "net"}, "--preset names network, guide and weight, got --net too"),
        (
            {"preset": "edm2-img512-s-guid-fid", "models": "."},
            r"folder with edm2-img512-s-2147483-0\.025\.pkl, .*https:",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_sampling(run, options, message):
    store("net")
    store("free", UNCONDITIONAL)
    store("wide", replace(CONFIG, img_resolution=16))
    store("other", replace(CONFIG, label_dim=3))
    store("latent", replace(CONFIG, img_channels=4))
    save_snapshot("theirs", Snapshot(params={"w": np.zeros(2)}, config=None, nimg=1, length=Length.of(0.1)))
    np.save("ids.npy", np.arange(11))
    np.save("rows.npy", np.zeros((4, 3), np.float32))
    sampler = ToySampler()
    with pytest.raises(InputError, match=message) as caught:
        run_sampling(options_of(SampleOptions, **options), sampler, prog=PROG)
    assert not sampler.calls
    assert "\n" not in str(caught.value)


def test_without_any_run_the_shipped_network_is_sampled(capsys):
    """But not another length of its average: for that there must be a run."""
    sample(seeds="0-1")
    assert "the network that ships with edm2" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train one with python -m backends\.toy\.train"):
        sample(sigma_rel=0.05)


def test_a_run_without_snapshots_says_how_to_get_some(run):
    for path in run.snapshots_path.iterdir():
        path.unlink()
    with pytest.raises(
        InputError, match=r": continue it with python -m backends\.toy\.train --outdir runs/00000-digits"
    ):
        sample()


def test_latents_are_sampled_into_an_npz():
    store("latent", replace(CONFIG, img_channels=4))
    assert npz(net="latent", seeds="0-1")["images"].shape == (2, 8, 8, 4)
