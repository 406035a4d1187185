"""edm2 evaluate and edm2 sweep: figures of networks and of images, kept in the run, the same however they are made."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.commands.cli import main
from backends.pipeline.metrics.extractors import pixels
from backends.pipeline.runs import shipped
from backends.pipeline.runs.evaluation import read_figures
from backends.pipeline.runs.sweeping import Domain, search
from edm2_core.errors import InputError
from edm2_core.frechet import Moments, distance

pytest.importorskip("torch")
QUICK = ("--steps", "3", "--device", "cpu", "--reference", "digits")


def said(capsys, *words, status=0):
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    return captured.out if not status else captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with two averages at each of three times."""
    from backends.torch.train import main as train

    path = tmp_path_factory.mktemp("trained") / "run"
    words = "--duration 3Ki --status 1Ki --snapshot 1Ki --batch 64 --no-picture --channels 16 --channels-per-head 16"
    assert train([*words.split(), "--outdir", str(path)]) == 0
    return path


@pytest.fixture
def digits_run(trained, tmp_path, monkeypatch):
    """A copy of it, where commands are run."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_network_is_measured_as_its_stored_images_are(tmp_path, monkeypatch, capsys):
    from backends.torch.sample import main as sample

    monkeypatch.chdir(tmp_path)
    words = ("--net", shipped.PATH, "--seeds", "0-29", "--steps", 3, "--device", "cpu", "--batch", 7)
    out = said(capsys, "evaluate", *words, "--metric", "frechet@pixels", "manifold@pixels", "--reference", "digits")
    assert sample([str(word) for word in (*words, "--outdir", "out", "--subdirs")]) == 0
    capsys.readouterr()
    again = said(
        capsys, "evaluate", "--images", "out", "--metric", "frechet@pixels", "manifold@pixels", "--reference", "digits"
    )
    assert figures(out) == figures(again)
    assert set(figures(out)) == {"frechet@pixels", "precision", "recall", "density", "coverage"}
    assert "(30 images, pixels)" in out
    assert "cannot be compared with figures of 50000" in out
    assert said(capsys, "evaluate", "--images", "digits", "--metric", "frechet@pixels", "--save", "ref.npz").startswith(
        "wrote"
    )
    last = said(capsys, "evaluate", "--images", "out", "--metric", "frechet@pixels", "--reference", "ref.npz")
    assert figures(last)["frechet@pixels"] == figures(out)["frechet@pixels"]


def figures(text):
    rows = [line.split() for line in text.splitlines() if " images, pixels)" in line]
    return {name: value for name, value, *_ in rows}


def test_the_figure_is_the_distance_of_the_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (60, 4, 4, 3), np.uint8), rng.integers(0, 200, (50, 4, 4, 3), np.uint8)]
    for name, array in zip("ab", images, strict=True):
        np.savez(f"{name}.npz", images=array)
    out = said(capsys, "evaluate", "--images", "a.npz", "--reference", "b.npz", "--metric", "frechet@pixels")
    a, b = (Moments.of(pixels(array.transpose(0, 3, 1, 2))).gaussian() for array in images)
    assert float(figures(out)["frechet@pixels"]) == pytest.approx(distance(a, b), rel=1e-5)


def test_two_processes_measure_what_one_does(digits_run, tmp_path):
    """To 1e-9: only the order of float64 sums differs."""
    evaluate = ["evaluate", "--net", "run", "--seeds", "0-20", "--batch", "4", *QUICK]
    evaluate += ["--metric", "frechet@pixels", "kernel@pixels"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29521"]
    for launcher in ([], torchrun):
        command = [sys.executable, *launcher, "-m", "backends.commands.cli", *evaluate]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, other = (
        {name: value for line in lines for name, value in line["figures"].items()}
        for lines in np.array_split(np.array(read_figures(digits_run / "figures.jsonl")), 2)
    )
    assert one == pytest.approx(other, rel=1e-9)
    assert one["frechet@pixels"] > 0


def test_figures_are_kept_with_all_they_depend_on(digits_run, capsys):
    said(capsys, "evaluate", "--run", "run", "--seeds", "0-9", *QUICK, "--metric", "frechet@pixels", "--class", "3")
    (line,) = read_figures(digits_run / "figures.jsonl")
    wanted = {"metric": "frechet@pixels", "count": 10, "nimg": 3072, "length": 0.1, "class": "3", "steps": "3"}
    assert {name: line[name] for name in wanted} == wanted
    assert (line["seeds"], line["reference"]) == ("0-9", "digits")


def test_a_sweep_measures_each_point_once_and_names_the_best(digits_run, capsys):
    words = ("sweep", "--run", "run", "--seeds", "0-19", *QUICK, "--metric", "frechet@pixels", "--points", 4)
    out = said(capsys, *words)
    assert out.count("(known)") == 0
    lines = read_figures(digits_run / "figures.jsonl")
    assert len(lines) == 4
    best = min(lines, key=lambda line: line["figures"]["frechet@pixels"])["point"]["sigma-rel"]
    assert f"--net run --sigma-rel {best} --steps 3" in out
    assert (digits_run / "sweep-frechet@pixels.png").stat().st_size > 5000
    again = said(capsys, *words)
    assert again.count("(known)") == 4
    assert len(read_figures(digits_run / "figures.jsonl")) == 4
    other = said(capsys, *words, "--vary", f"sigma-rel={best},0.2", "S-churn=0,5")
    assert other.count("(known)") == 1  # the best, whose other setting is the usual one


def test_what_is_known_of_other_guides_or_data_is_measured_again(digits_run, capsys):
    first, last = (sorted((digits_run / "snapshots").glob("*-0.100.safetensors"))[i] for i in (0, -1))
    np.savez("data.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8))
    words = ("sweep", "--run", "run", "--seeds", "0-9", *QUICK[:-1], "data.npz", "--metric", "frechet@pixels",
             "--guide", "guide.safetensors", "--vary", "guidance=2,3")  # fmt: skip
    shutil.copy(first, "guide.safetensors")
    assert said(capsys, *words).count("(known)") == 0
    assert said(capsys, *words).count("(known)") == 2
    shutil.copy(last, "guide.safetensors")
    assert said(capsys, *words).count("(known)") == 0
    np.savez("data.npz", images=np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1), np.uint8))
    assert said(capsys, *words).count("(known)") == 0


def test_of_precision_the_highest_is_the_best(digits_run, capsys):
    from backends.torch.sample import main as sample

    made = "--run run --seeds 100-160 --steps 3 --device cpu --format npz --outdir out"
    assert sample(made.split()) == 0
    capsys.readouterr()
    words = ("sweep", "--run", "run", "--seeds", "0-29", *QUICK[:-1], "out/samples.npz", "--metric", "manifold@pixels")
    out = said(capsys, *words, "--vary", "sigma-rel=0.05,0.1,0.15,0.2")
    lines = read_figures(digits_run / "figures.jsonl")
    precisions = {line["point"]["sigma-rel"]: line["figures"]["precision"] for line in lines}
    assert len(set(precisions.values())) > 1
    best = next(line for line in out.splitlines() if line.startswith("best"))
    assert best.endswith(f": {max(precisions.values()):.6g}")
    assert said(capsys, "report", "run", "--no-samples")
    page = Path("run/report/report.html").read_text(encoding="utf-8")
    assert f"best {max(precisions.values()):.4g}" in page


@pytest.mark.parametrize(
    "vary", [("unet.enc.*=0.05,0.1",), ("guide-sigma-rel=0.05,0.07", "guidance=1.5,2"), ("guide-highest=1,5",)]
)
def test_anything_of_sampling_is_varied(digits_run, capsys, vary):
    words = ("--guide", "run", "--guidance", 2) if "guide" in vary[0] else ()
    words += ("--guide-sigma-rel", 0.05) if "highest" in vary[0] else ()
    out = said(capsys, "sweep", "--run", "run", "--seeds", "0-9", *QUICK, *words, "--metric", "frechet@pixels",
               "--vary", *vary)  # fmt: skip
    values = [line["figures"]["frechet@pixels"] for line in read_figures(digits_run / "figures.jsonl")]
    assert len(set(values)) == len(values) == 2 ** len(vary)
    assert "best " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sweep", "--run", "run", "--vary", "device=1,2"), "--vary must be of S-churn"),
        (("sweep", "--run", "run", "--vary", "sigma-rel=0.2:0.1"), "--vary must be NAME=LOW:HIGH or NAME=A,B,C"),
        (("sweep", "--run", "run", "--vary", "guidance=1,2", "guidance=3"), "--vary must name each thing once"),
        (
            ("sweep", "--run", "run", "--search", "golden", "--vary", "guidance=1,2", "--metric", "frechet@pixels"),
            "golden is for one range",
        ),
        (("sweep", "--run", "nothing"), "must be a folder with a config.json"),
        (("evaluate", "--run", "run", "--metric", "fidd"), "a metric must be one of fid"),
        (("evaluate", "--images", "run", *QUICK[-2:], "--metric", "frechet@pixels"), "data must hold images"),
        (("evaluate", "--images", "digits", "--metric", "frechet@pixels"), "must have a --reference, got none"),
        (
            ("evaluate", "--images", "digits", *QUICK[-2:], "--weights", "x", "--metric", "frechet@pixels"),
            "--weights are of",
        ),
        (
            ("evaluate", "--run", "run", "--metric", "frechet@pixels", "--seeds", "0", "--steps", "2"),
            "at least 2 images",
        ),
    ],
)
def test_bad_input_is_one_line(digits_run, capsys, words, message):
    err = said(capsys, *words, "--device", "cpu", status=2)
    assert message in err.splitlines()[-1]
    assert not (digits_run / "figures.jsonl").exists()


def test_training_measures_its_averages(tmp_path, monkeypatch, capsys):
    from backends.torch.train import main as train

    monkeypatch.chdir(tmp_path)
    words = "--duration 2Ki --batch 64 --no-picture --outdir run --channels 16 --channels-per-head 16 --device cpu"
    scores = "--evaluate 1Ki --evaluate-metric frechet@pixels --evaluate-images 20 --evaluate-steps 3"
    assert train([*words.split(), *scores.split()]) == 0
    err = capsys.readouterr().err
    lines = read_figures(tmp_path / "run" / "figures.jsonl")
    assert [(line["nimg"], line["length"]) for line in lines] == [(1024, 0.05), (1024, 0.1), (2048, 0.05), (2048, 0.1)]
    best = min(lines, key=lambda line: line["figures"]["frechet@pixels"])
    shown = f"best so far {best['figures']['frechet@pixels']:.4g} by {best['length']} at {best['nimg']} images"
    assert shown in err.splitlines()[-1]
    assert said(capsys, "report", "run", "--no-samples")
    page = Path("run/report/report.html").read_text(encoding="utf-8")
    assert "frechet@pixels" in page


# ---- searches


def asked(domain, figure, **options):
    points = []

    def ask(point):
        points.append(point)
        return figure(*point)

    search([Domain.of(text) for text in domain], ask, **options)
    return points


@pytest.mark.parametrize("best", [0.031, 0.06, 0.1, 0.17, 0.24])
def test_a_golden_section_is_within_a_tenth_with_a_third_of_a_grid(best):
    """The grid has the same resolution: 23 lengths from 0.03 to 0.25, each a tenth longer than the one before."""
    points = asked(["sigma-rel=0.03:0.25"], lambda x: np.log(x / best) ** 2)
    found = min(points, key=lambda point: np.log(point[0] / best) ** 2)[0]
    assert len(points) <= 23 // 3
    assert found == pytest.approx(best, rel=0.1)


def test_a_grid_is_all_combinations():
    points = asked(["guidance=1,2", "sigma-rel=0.05:0.2"], lambda *_: 0.0, kind="grid", grid=3)
    assert points == [(g, s) for g in (1, 2) for s in (0.05, 0.1, 0.2)]


def test_a_gaussian_process_finds_a_valley_of_two_settings():
    pytest.importorskip("optuna")

    def valley(s, w):
        return np.log(s / 0.08) ** 2 + (w - 1.7) ** 2

    points = asked(["sigma-rel=0.03:0.25", "guidance=1:3"], valley, points=18)
    assert len(points) == 18
    s, w = min(points, key=lambda point: valley(*point))
    assert s == pytest.approx(0.08, rel=0.2)
    assert w == pytest.approx(1.7, abs=0.15)


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=1:", "a=2:1", "a=1:inf", "a=1,b"])
def test_domains_are_ranges_or_values(text):
    with pytest.raises(ValueError):  # noqa: PT011, command_line makes a line of it
        Domain.of(text)


def test_golden_is_refused_for_several():
    with pytest.raises(InputError, match="golden is for one range, got a=1:2 b=1:2"):
        asked(["a=1:2", "b=1:2"], lambda *_: 0.0, kind="golden")
