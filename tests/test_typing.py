"""The public API under a strict type checker, with arrays of every library."""

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")
ROOT = Path(__file__).parents[1]

NUMPY = """
from typing import assert_type
import numpy as np
import numpy.typing as npt
from edm2_core import ema, loss, mp, precond, sampler
from edm2_core.arrays import Array

Single = npt.NDArray[np.float32]

def arrays(x: Single, wide: np.ndarray) -> None:
    any_array: Array = x
    assert_type(mp.mp_silu(x), Single)
    assert_type(mp.mp_sum(x, x, t=0.3), Single)
    assert_type(mp.resample(x, mode="down"), Single)
    assert_type(mp.mp_weight(wide, gain=2.0), np.ndarray)
    assert_type(precond.precondition(x).c_in, Single)
    assert_type(ema.coefficients(in_time=[1, 2], in_sigma_rel=x, out_time=2, out_sigma_rel=0.1), Single)
    assert_type(ema.coefficients(in_time=[1, 2], in_sigma_rel=[0.05, ema.Length.raw(8)], out_time=2, out_sigma_rel=0.1),
                np.ndarray)
    mp.normalize(np.zeros((2, 3)))

def numbers() -> None:
    assert_type(mp.silu(0.5), float)
    assert_type(precond.precondition(0.5).c_in, float)
    assert_type(loss.weight(0.5, sigma_data=1.0), float)
    assert_type(ema.beta(0.05, t_next=2, t_delta=1), float)
"""
TORCH = """
from typing import assert_type
import torch
from torch import Tensor
from edm2_core import mp, precond, sampler

def denoise(x: Tensor, sigma: float) -> Tensor:
    return x * sigma

def halve(step: sampler.Step[Tensor]) -> Tensor:
    return step.x / 2

def tensors(x: Tensor) -> None:
    assert_type(mp.mp_silu(x), Tensor)
    assert_type(mp.normalize(x, axis=1), Tensor)
    assert_type(precond.denoise(lambda scaled, c_noise: scaled + c_noise, x, x), Tensor)
    assert_type(sampler.sample(denoise, x, callback=halve), Tensor)
"""
OTHERS = """
from typing import assert_type
import jax
import mlx.core as mx
from edm2_core import mp

def others(x: jax.Array, y: mx.array) -> None:
    assert_type(mp.mp_silu(x), jax.Array)
    assert_type(mp.mp_silu(y), mx.array)
"""
WRONG = """
import numpy as np
from edm2_core import mp
mp.mp_silu("x")
mp.mp_sum(0.5, 0.5, share=0.3)
text: str = mp.mp_silu(np.zeros(3))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Line numbers of errors by snippet, from one run of ``mypy --strict``."""
    folder, snippets = tmp_path_factory.mktemp("snippets"), {"numpy": NUMPY, "wrong": WRONG}
    if find_spec("torch"):
        snippets["torch"] = TORCH
    if find_spec("jax") and find_spec("mlx"):
        snippets["others"] = OTHERS
    for name, source in snippets.items():
        (folder / f"of_{name}.py").write_text(source)
    options = ["--strict", "--no-error-summary", "--hide-error-context", f"--cache-dir={ROOT / '.mypy_cache'}"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, folder.iterdir())]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.stderr == ""
    lines = [line.split(":") for line in out.stdout.splitlines() if ": error: " in line]
    # not by folder: mypy keeps the lines of a file of equal name and text, with the folder of the run before
    assert {Path(path).stem for path, *_ in lines} <= {f"of_{name}" for name in snippets}, out.stdout
    return {name: [int(number) for path, number, *_ in lines if Path(path).stem == f"of_{name}"] for name in snippets}


@pytest.mark.parametrize("library", ["numpy", "torch", "others"])
def test_arrays_of_each_library_come_back_as_what_they_are(library, errors):
    if library not in errors:
        pytest.skip("not installed")
    assert errors[library] == []


def test_wrong_calls_are_errors(errors):
    assert set(errors["wrong"]) == {4, 5, 6}


def test_the_core_is_strict_and_ships_its_types():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    strict = [one for one in settings["tool"]["mypy"]["overrides"] if "edm2_core.*" in one["module"]]
    assert strict[0]["disallow_any_generics"]
    for package in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").exists()
