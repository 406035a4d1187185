"""Data of every kind through the commands of every port: trained on, sampled, decoded."""

import json
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NETWORK = "--channels 8 --channel-mult 1 2 --blocks 1 --attention 0 --channels-per-head 8"
SMALL = f"{NETWORK} --batch 8 --duration 2Ki --telemetry 0"
TWICE = f"{SMALL} --duration 16 --rampup 0 --snapshot 1Ki --no-picture"


@pytest.fixture(params=["torch", "jax", "mlx"])
def port(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip({"mlx": "mlx.core"}.get(request.param, request.param))
    monkeypatch.chdir(tmp_path)
    return request.param


def run(port: str, name: str, words: str, status: int = 0) -> None:
    done = import_module(f"backends.{port}.{name}").main(words.split())
    assert (done or 0) == status


def test_float_fields_with_a_condition_and_a_label_vector(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rectangles that do not halve; samples are in the data's units, by the condition and the vector of each seed."""
    rng = np.random.default_rng(0)
    fields = (rng.standard_normal((20, 5, 6, 9)) * 3 + 100).astype(np.float32)
    np.save("fields.npy", fields)
    np.save("fields-labels.npy", rng.standard_normal((20, 2)).astype(np.float32))
    np.save("given.npy", fields[:, :2] / 10)
    run(port, "train", f"--data fields.npy --condition given.npy --pad --flip --holdout 0.2 --outdir run {TWICE}")
    said = capsys.readouterr().out
    assert "20 images of 9x6x5, label vectors of length 2" in said
    assert "condition of 2 channels" in said
    record = [json.loads(line) for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert len(record["holdout_by_sigma"]) == 5
    assert np.isfinite(record["holdout"])
    run(port, "sample", "--run run --seeds 0-2,20 --steps 3 --outdir out")
    with np.load("out/samples.npz") as made:
        images, labels = made["images"], made["labels"]
    assert (images.shape, images.dtype, labels.shape) == ((4, 6, 9, 5), np.float32, (4, 2))
    assert np.abs(images - 100).max() < 100  # in the units of the data, not clipped
    np.testing.assert_array_equal(labels[3], labels[0])  # seed 20 takes sample 0 of 20


def test_latents_are_trained_on_and_decoded(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The pictures are diffusers' of the latents that --format latents gives."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
        vae.save_pretrained("vae")
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    for i in range(8):
        moments = np.concatenate([rng.standard_normal((4, 8, 8)), rng.uniform(0.1, 0.2, (4, 8, 8))])
        np.save(f"data/{i}.npy", moments.astype(np.float32))
    manifest = {"encoder": str(Path("vae").absolute()), "moments": True, "mean": [0, 0, 0, 0], "std": [1, 1, 1, 1]}
    Path("data/latents.json").write_text(json.dumps(manifest), encoding="utf-8")
    run(port, "train", f"--data data --outdir run {TWICE}")
    for kind in ("latents", "png"):
        run(port, "sample", f"--run run --seeds 0-1 --steps 3 --format {kind} --outdir {kind}")
    with np.load("latents/latents.npz") as made, torch.inference_mode():
        latents = made["latents"]
        wanted = vae.decode(torch.from_numpy(latents)).sample.numpy() * 127.5 + 127.5
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), np.float32)
    for seed, image in enumerate(wanted):
        with Image.open(f"png/{seed:06d}.png") as picture:
            pixels = np.asarray(picture).transpose(2, 0, 1).astype(float)
        assert np.abs(pixels - image.clip(0, 255)).max() <= 0.51
    Path("vae").rename("elsewhere")
    capsys.readouterr()
    run(port, "sample", "--run run --seeds 0 --steps 3 --outdir plain")
    assert "samples stay latents" in capsys.readouterr().out
    assert Path("plain/samples.npz").exists()


def test_photographs_from_pictures_to_a_report(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    from examples.photographs import Options, main

    main(Options(outdir=Path("photographs"), port=port, each=4, size="16x16", duration=64))  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "48 images, 12 classes" in said
    assert "photographs/samples/000023.png" in said or Path("photographs/samples/000023.png").exists()
    assert Path("photographs/run/report/report.html").exists()


def test_the_report_samples_with_the_run_s_own_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so where they are gone."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    from backends.commands.cli import main as edm2

    rng = np.random.default_rng(0)
    np.save("fields.npy", rng.standard_normal((12, 2, 8, 8)).astype(np.float32))
    np.save("fields-labels.npy", rng.standard_normal((12, 2)).astype(np.float32))
    np.save("given.npy", rng.standard_normal((12, 1, 8, 8)).astype(np.float32))
    run("torch", "train", f"--data fields.npy --condition given.npy --outdir run {TWICE}")
    words = ["report", "run", "--port", "torch", "--steps", "2", "--seeds", "0-1", "--sigma-rels", "0.10"]
    assert edm2(words) == 0
    assert "data:image" in Path("run/report/report.html").read_text(encoding="utf-8")
    Path("given.npy").unlink()
    assert edm2(words) == 0
    assert "which does not exist" in Path("run/report/report.html").read_text(encoding="utf-8")
