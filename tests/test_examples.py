"""The examples, run as a reader runs them: what they print supports what they claim."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.pipeline.checkpoints.safetensors_io import TensorFile

ROOT = Path(__file__).parents[1]


def run(example, *options):
    """The table that an example prints: a row of numbers by its first word."""
    command = [sys.executable, "-m", f"examples.{example}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = (line.split() for line in done.stdout.splitlines()[1:])
    return {name: [float(number.rstrip("%")) for number in numbers] for name, *numbers in rows}


POSTHOC = ("torch", "jax", "mlx")


@pytest.mark.parametrize("framework", POSTHOC)
def test_posthoc_ema_finds_a_length_between_the_extremes_that_beats_the_raw_weights(tmp_path, framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    table = run(f"posthoc_ema_{framework}", "--images", 16_000, "--folder", tmp_path)
    loss = {name: row[0] for name, row in table.items()}
    raw, lengths = loss.pop("raw"), list(loss)
    assert len(lengths) == 10
    best = min(loss, key=loss.__getitem__)
    assert loss[best] < 0.8 * raw
    assert best not in (lengths[0], lengths[-1])  # so the length matters, both ways
    assert table[best][1] > table["raw"][1]
    stored = {path.stem.split("-")[1] for path in tmp_path.iterdir()}
    assert stored == {"0.050", "0.100"}  # the other eight were made afterwards


@pytest.mark.parametrize("framework", POSTHOC)
def test_posthoc_ema_is_short_enough_to_copy(framework):
    text = (ROOT / "examples" / f"posthoc_ema_{framework}.py").read_text()
    assert len(text.splitlines()) < 60
    assert not re.search(r"network|edm2_core", "".join(re.findall(r"^(?:from|import) .*", text, re.MULTILINE)))


OTHERS = {  # the package that each needs, and a short run
    "lightning": ("lightning", "--epochs", 8),
    "transformers": ("accelerate", "--steps", 100),
    "accelerate": ("peft", "--steps", 150),
    "nnx": ("flax", "--images", 16_000),
    "equinox": ("equinox", "--images", 16_000),
    "mlx_lora": ("mlx_lm", "--steps", 90),
}


@pytest.mark.parametrize("trainer", OTHERS)
def test_posthoc_ema_in_the_trainers_of_others_chooses_a_length_that_beats_the_raw_weights(tmp_path, trainer):
    package, *options = OTHERS[trainer]
    pytest.importorskip(package, reason=f"{package} is not installed")
    lines = printed(f"posthoc_ema_{trainer}", *options, "--folder", tmp_path)
    values = {
        words[0]: float(words[1]) for line in lines[-12:] if re.match(r"raw|0\.\d", line) for words in [line.split()]
    }
    (best,) = [line.split()[0] for line in lines if line.endswith("*")]
    raw = values.pop("raw")
    assert len(values) > 5
    assert values[best] == min(values.values()) < raw
    text = (ROOT / "examples" / f"posthoc_ema_{trainer}.py").read_text()
    assert len(text.splitlines()) < 60
    snapshots = sorted(tmp_path.rglob("*-0.050.safetensors"))
    assert len(snapshots) >= 6
    stored = TensorFile(snapshots[-1]).entries
    assert all("lora" in name for name in stored) == (trainer in ("accelerate", "mlx_lora"))


def test_the_comparison_of_averages_has_a_row_for_each_method():
    pytest.importorskip("torch", reason="torch is not installed")
    *rows, cost = printed("posthoc_ema_compare", "--epochs", 12, "--seeds", 2)
    test_loss = {row[:18].strip(): float(row[18:].split()[0]) for row in rows}
    assert list(test_loss)[:3] == ["raw weights", "fixed decay 0.99", "fixed decay 0.999"]
    assert test_loss["post-hoc"] < 0.8 * test_loss["raw weights"]
    assert test_loss["post-hoc"] < test_loss["fixed decay 0.999"]  # 600 steps are short for it
    assert cost.startswith("a step ")


def test_toy_2d_guidance_has_fewer_outliers_and_denser_points(tmp_path):
    table = run("toy_2d", "--images", 131_072, "--out", tmp_path / "toy.png")
    median, outliers = ({name: row[column] for name, row in table.items()} for column in (0, 1))
    assert outliers["data"] == 1  # by definition
    assert outliers["guided"] < 0.9 * outliers["unguided"]
    assert median["guided"] > median["unguided"] + 0.1
    panels = picture_panels(tmp_path / "toy.png")
    assert len({panel.tobytes() for panel in panels}) == 3
    assert all(0.005 < (panel != panel[0, 0]).any(axis=2).mean() < 0.3 for panel in panels)  # ink on paper


SHORT = {"torch": ("--images", 2560), "jax": ("--steps", 300), "mlx": ("--images", 16384, "--samples", 64)}


@pytest.mark.parametrize("framework", SHORT)
def test_a_backbone_of_one_s_own_trains_and_is_sampled(tmp_path, framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    out = ("--out", tmp_path / "out.png") if framework == "torch" else ()
    lines = printed(f"own_backbone_{framework}", *SHORT[framework], *out)
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", lines[-1])]
    assert numbers
    assert "nan" not in lines[-1]
    text = (ROOT / "examples" / f"own_backbone_{framework}.py").read_text()
    assert len(text.splitlines()) < 80


STUDIES = {
    "ema_length": ("--rates", 0.05, "--durations", "2Ki"),
    "ema_tensors": ("--duration", "2Ki", "--tensors", "out_conv", "--seeds", 2),
    "guidance_length": ("--duration", "2Ki", "--weights", 1, "--samples", 70),
    "weight_growth": ("--duration", "2Ki"),
    "overfitting": ("--duration", "2Ki", "--dropout", 0.1, "--count", 50),
}


@pytest.mark.parametrize("study", STUDIES)
def test_studies_end_with_their_table(tmp_path, study):
    pytest.importorskip("torch", reason="torch is not installed")
    lines = printed(study, *STUDIES[study], "--folder", tmp_path / "study")
    assert [line for line in lines if re.match(r"\s*[-+]?\d", line)]
    assert not [line for line in lines if "nan" in line.split()]


def test_every_guide_changes_what_one_network_samples(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    options = ("--duration", "2Ki", "--earlier", 1024, "--weights", 1, 2, "--samples", 66, "--folder", tmp_path)
    rows = {line[:14].strip(): line[14:].split() for line in printed("guidance", *options)[-4:]}
    assert list(rows) == ["none", "label dropout", "unconditional", "shorter run"]
    of_one = [rows[name] for name in ("none", "unconditional", "shorter run")]
    assert len({tuple(row[1:3]) for row in of_one}) == 1  # weight 1 is the network alone
    for column in (0, 3):  # the guide alone, and guided by 2
        assert len({row[column] for row in rows.values()}) == 4


def test_the_ladder_ends_with_a_row_for_each_rung_and_a_page(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    options = ("--rungs", "A", "G", "--duration", "1Ki", "--samples", 70, "--folder", tmp_path / "ladder")
    lines = printed("ladder", *options)
    rows = {line.split()[0]: line.split()[1:] for line in lines if re.match(r"[AG] +\d", line)}
    assert set(rows) == {"A", "G"}
    assert all(len(row) == 5 for row in rows.values())
    assert (tmp_path / "ladder" / "report" / "report.html").stat().st_size > 10_000


def test_an_average_is_closer_to_real_digits_than_raw_weights_at_a_high_learning_rate(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    options = ("--duration", "10Ki", "--samples", 66, "--folder", tmp_path / "runs", "--out", tmp_path / "out.png")
    rows = [line.split() for line in printed("averaging", *options)[-11:]]
    distances = {row[0]: float(row[2]) for row in rows}
    assert len(distances) == 11
    assert min(distances.values()) < 0.95 * distances["raw"]
    with Image.open(tmp_path / "out.png") as picture:
        assert 1300 < picture.width < 1500
    assert (tmp_path / "out.png").stat().st_size < 300_000


def printed(example, *options):
    command = [sys.executable, "-m", f"examples.{example}", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def picture_panels(path):
    picture = np.asarray(Image.open(path))
    return [picture[12:332, 12 + i * 324 : 332 + i * 324] for i in range(3)]
