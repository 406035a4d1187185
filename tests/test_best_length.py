"""The best averaging length by one's own function of the weights: in each framework, and as a command.

A weight grows with the time t as t/T, so its average at T is (gamma + 1) / (gamma + 2): a function that wants the value
that this has at 0.11 is lowest there.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.commands.cli import main
from backends.pipeline.checkpoints.averages import save_averages
from backends.pipeline.runs.best_length import best_length
from edm2_core import ema
from edm2_core.errors import InputError

STEPS, WANTED = 256, 0.11
GAMMA = ema.sigma_rel_to_gamma(WANTED)
TARGET = (GAMMA + 1) / (GAMMA + 2)


def save(folder, first, every):
    averages = ema.start({"w": np.zeros(2, np.float32)})
    for time in range(1, STEPS + 1):
        averages = ema.advance(averages, {"w": np.float32([time / STEPS, 1])}, t_next=time, t_delta=1)
        if time >= first and time % every == 0:
            stored = [(ema.Length.of(length), list(average.items())) for length, average in averages.items()]
            save_averages(folder, stored, time=time, kept={}, dtype="float32")


@pytest.fixture
def snapshots(tmp_path):
    save(tmp_path / "snapshots", 1, 16)
    return tmp_path / "snapshots"


def distance(weights):
    return abs(float(weights["w"][0]) - TARGET)


def test_the_search_finds_the_length_to_a_tenth(snapshots):
    best = best_length(snapshots, lambda snapshot: distance(snapshot.params))
    assert best.sigma_rel == pytest.approx(WANTED, rel=0.1)
    assert best.value == min(best.values.values()) == best.values[best.sigma_rel]
    assert len(best.values) <= 9
    given = best_length(snapshots, lambda snapshot: distance(snapshot.params), sigma_rels=[0.2, 0.12, 0.07])
    assert (given.sigma_rel, list(given.values)) == (0.12, [0.07, 0.12, 0.2])


def test_lengths_that_the_snapshots_cannot_give_are_not_measured(tmp_path):
    save(tmp_path, STEPS, 1)  # the last two averages alone
    best = best_length(tmp_path, lambda snapshot: 1.0, sigma_rels=[0.01, 0.05, 0.07, 0.1])
    assert set(best.values) == {0.05, 0.07, 0.1}
    with pytest.raises(InputError, match="close enough"):
        best_length(tmp_path, lambda snapshot: 1.0, sigma_rels=[0.01])


@pytest.mark.parametrize(
    ("options", "metric", "message"),
    [({"points": 1}, distance, "points must be 2"), ({}, lambda weights: float("nan"), "finite number, got nan for")],
)
def test_what_cannot_be_compared_is_refused(snapshots, options, metric, message):
    with pytest.raises(InputError, match=message):
        best_length(snapshots, lambda snapshot: metric(snapshot.params), **options)


def test_torch_measures_a_module_and_gives_it_back_its_weights(snapshots):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from backends.torch.ema import best_length

    module = torch.nn.ParameterDict({"w": torch.tensor([7.0, 8.0])})
    best = best_length(snapshots, like=module, metric=lambda module: abs(module["w"][0].item() - TARGET))
    assert best.sigma_rel == pytest.approx(WANTED, rel=0.1)
    assert module["w"].tolist() == [7, 8]
    with pytest.raises(ZeroDivisionError):
        best_length(snapshots, like=module, metric=lambda module: 1 / 0)
    assert module["w"].tolist() == [7, 8]
    with pytest.raises(InputError, match="like must have w"):
        best_length(snapshots, like=torch.nn.Linear(2, 1), metric=lambda module: 0.0)


def test_jax_measures_a_tree(snapshots):
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    from backends.jax.ema import best_length

    best = best_length(snapshots, like={"w": jnp.zeros(2)}, metric=lambda tree: abs(tree["w"][0] - TARGET))
    assert best.sigma_rel == pytest.approx(WANTED, rel=0.1)


def test_mlx_measures_a_module_and_gives_it_back_its_weights(snapshots):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from mlx import nn

    from backends.mlx.ema import best_length

    module = nn.Module()
    module.w = mx.array([7.0, 8.0])
    best = best_length(snapshots, like=module, metric=lambda module: mx.abs(module.w[0] - TARGET))
    assert best.sigma_rel == pytest.approx(WANTED, rel=0.1)
    assert module.w.tolist() == [7, 8]
    with pytest.raises(InputError, match="like must have w"):
        best_length(snapshots, like=nn.Linear(2, 1), metric=lambda module: 0.0)


def test_the_command_measures_a_folder_of_any_model(snapshots, tmp_path, monkeypatch, capsys):
    code = f"def distance(weights):\n    return abs(weights['w'][0] - {TARGET})\n\n\n"
    (tmp_path / "measures_of_mine.py").write_text(code + "def text(weights):\n    return 'low'\n\n\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["sweep", "--run", str(snapshots), "--metric", "measures_of_mine:distance"]
    assert main(words) == 0
    *_, best, following = capsys.readouterr().out.splitlines()
    assert float(best.split()[2].rstrip(":")) == pytest.approx(WANTED, rel=0.15)
    assert following.startswith(f"next     edm2 reconstruct {snapshots} --sigma-rels 0.1")
    assert main([*words, "--vary", "w*=0.05,0.11,0.2"]) == 0
    assert "best     w* 0.11" in capsys.readouterr().out
    for wrong, message in (
        ([*words[:3], "--metric", "measures_of_mine:text"], "must return a number, got str"),
        ([*words[:3], "--metric", "measures_of_mine:nothing"], "that can be imported"),
        ([*words[:3], "--metric", "measures_of_mine:NUMBER"], "a metric must be a function, got measures_of_mine:NUM"),
        ([*words, "--points", "0"], "--points must be 2 or more, got 0"),
        ([*words, "--search", "grid", "--grid", "0"], "--grid must be 2 or more, got 0"),
        ([*words, "--vary", "guidance=1:2"], "is of weights alone"),
        (["sweep", *words[3:]], "give --run FOLDER"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_a_module_in_the_current_folder_is_found_as_by_python_m(snapshots, tmp_path):
    (tmp_path / "measures_beside_me.py").write_text("def zero(weights):\n    return 0.0\n")
    words = ["sweep", "--run", str(snapshots), "--metric", "measures_beside_me:zero", "--points", "2"]
    line = [sys.executable, "-P", "-m", "backends.commands.cli", *words]  # -P: as where the script edm2 runs
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(line, env=where, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "best     sigma-rel" in done.stdout
