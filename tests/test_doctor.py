"""edm2 doctor: the check of each port, and what is said where something is wrong."""

import sys
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import pytest
from packaging.requirements import Requirement

from backends.commands import doctor, port_check
from backends.commands.cli import main as edm2
from conformance.examples.numpy_port.adapter import NumpyPort
from conformance.training_port import TrainingPort

ROW = dict.fromkeys(doctor._COLUMNS, "-") | {"port": "good", "forward": 0.1, "step": 0.2, "seconds": 1.5}


class Points(list):
    """Entry points, as importlib.metadata gives them."""

    def __call__(self, *, group, name=None):
        assert group == "edm2.ports"
        return [point for point in self if name in (None, point.name)]


@pytest.fixture
def registered(monkeypatch):
    """Registers ports of these values by name, and nothing else."""

    def register(**values):
        points = Points(metadata.EntryPoint(name, value, "edm2.ports") for name, value in values.items())
        monkeypatch.setattr(metadata, "entry_points", points)

    return register


def test_a_real_port_is_well_and_the_command_says_so(capsys, monkeypatch):
    """In a process of its own, as always."""
    pytest.importorskip("torch")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if "torch" not in {point.name for point in metadata.entry_points(group="edm2.ports")}:
        pytest.skip("edm2 is not installed")
    assert edm2(["doctor", "--ports", "torch"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("torch  ") and "cpu" in line]
    *_, bfloat16, float16, _, float64, forward, step, _ = line.split()
    assert (bfloat16, float16, float64) == ("yes", "yes", "yes")
    assert float(forward) <= 1
    assert float(step) <= 1
    assert out.endswith("all is well\n")
    assert "a token is set by HF_TOKEN" in out
    assert "secret" not in out


@pytest.mark.parametrize("name", ["jax", "mlx"])
def test_the_forward_pass_of_each_port_is_compared_with_the_reference(name):
    pytest.importorskip(name)
    (point,) = metadata.entry_points(group="edm2.ports", name=name) or pytest.skip("edm2 is not installed")
    port = point.load()
    assert port_check._forward_error(port, port_check._params()) / port_check.FORWARD <= 1
    assert {"device", "memory", "tf32", "float64"} == port_check._FACTS[name](port.device).keys()


class Wrong(TrainingPort):
    """A port that is ``wrong`` in the forward pass or in the step."""

    wrong = ""

    def denoise(self, *args):
        denoised, logvar = super().denoise(*args)
        return denoised * (1 + 1e-4 * (self.wrong == "forward")), logvar

    def train(self, config, params, batches, **options):
        losses, after, averages = super().train(config, params, batches, **options)
        if self.wrong == "step":  # that the weights did not move
            after = params
        return (losses[:1] * len(losses) if self.wrong == "still" else losses), after, averages


WELL, FORWARD, STEP, STILL = (type("Wrong", (Wrong,), {"wrong": fault})() for fault in ("", "forward", "step", "still"))


@pytest.mark.parametrize(
    ("value", "wrong"), [("WELL", []), ("FORWARD", ["forward"]), ("STEP", ["step"]), ("STILL", ["step"])]
)
def test_a_fault_in_the_forward_pass_or_the_step_is_found(registered, value, wrong):
    pytest.importorskip("torch")
    registered(mine=f"{__name__}:{value}")
    (row,) = port_check.checked("mine")["rows"]
    assert [what for what in ("forward", "step") if not row[what] <= 1] == wrong
    problems = []
    list(doctor._rows("mine", {"rows": [row]}, problems))
    assert [problem.split()[0] for problem in problems] == wrong


def test_ports_that_are_absent_broken_or_hang_are_told_apart(registered, monkeypatch, tmp_path, capsys):
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "lacks.py").write_text("raise ModuleNotFoundError('No module named jax', name='jax')\n")
    (tmp_path / "breaks.py").write_text("raise OSError('no driver\\nfor this')\n")
    sites = [tmp_path / "edm2_doctors-1.0.dist-info"]
    sites[0].mkdir()
    ports = "".join(f"{name} = {name}:PORT\n" for name in ("ends", "hangs", "lacks", "breaks"))
    (sites[0] / "entry_points.txt").write_text(f"[edm2.ports]\n{ports}")
    (sites[0] / "METADATA").write_text("Metadata-Version: 2.1\nName: edm2-doctors\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_SECONDS", 6)
    assert edm2(["doctor", "--ports", "ends", "hangs", "lacks", "breaks", "nowhere"]) == 1
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("problem")]
    for name, why in (
        ("ends", "its process ended with status 3"),
        ("hangs", "no answer in 6 seconds"),
        ("breaks", "OSError: no driver for this"),
        ("nowhere", "no port of this name is registered"),
    ):
        assert any(f"port {name} must run, got '{why}" in line for line in problems)
    assert any(line.endswith("is registered': correct the name") for line in problems)
    assert "lacks  not installed: pip install 'edm2[jax]'" in out
    assert "a port must be installed to train or sample, got none that works" in problems[-1]
    assert out.endswith("5 to mend\n")


def test_nothing_registered_is_a_problem_of_the_installation(registered, capsys):
    registered()
    assert edm2(["doctor"]) == 1
    assert "edm2 must be installed for its ports to be found, got none: pip install -e ." in capsys.readouterr().out


def test_an_extra_lacks_what_is_missing_or_too_old(monkeypatch):
    needs = [
        "numpy>=1.26",
        'edm2[run]; extra == "metrics"',
        'transformers>=4; extra == "metrics"',
        'nowhere>=1; extra == "metrics"',
        'pillow>=9999; extra == "run"',
        'nothing>=1; extra == "run" and python_version < "3"',
    ]
    assert {need.name for need in doctor._of_extra("metrics", [*map(Requirement, needs)])} == {
        "transformers",
        "nowhere",
        "pillow",
    }
    assert doctor._lack(Requirement("numpy>=1.26")) == ""
    assert doctor._lack(Requirement("nowhere>=1")) == "nowhere"
    assert doctor._lack(Requirement("pillow>=9999")).startswith("pillow>=9999 (here ")


def test_the_state_of_the_hub_has_no_token(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "a token is set by HF_TOKEN" in doctor._hub()[0]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert doctor._hub() == ["no huggingface_hub: pip install 'edm2[hub]'"]


@dataclass(frozen=True)
class Rounded(NumpyPort):
    """Whose images are rounded to so many parts."""

    precision: str = "float32"

    def denoise(self, *args):
        if self.precision == "float16":
            raise TypeError("no such dtype")
        denoised, logvar = super().denoise(*args)
        return np.round(denoised) if self.precision == "bfloat16" else denoised, logvar


def test_narrow_precisions_are_computed_not_believed():
    params = port_check._params()
    assert port_check._narrow(NumpyPort(), params, "bfloat16") == "-"  # nothing is known of it
    assert port_check._narrow(Rounded(), params, "bfloat16") == "wrong"
    assert port_check._narrow(Rounded(), params, "float16") == "no"
