"""The suite as a person with a port of their own meets it: options, exit status, words, report."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import contract, known, report
from conformance.plugin import shortfall
from conformance.strategies import FEW_CONFIGS
from conformance.wrong_ports import FAULTS

ADAPTER = """
from conformance.examples.numpy_port.adapter import NumpyPort
from conformance.training_port import TrainingPort
from conformance.wrong_ports import FAULTS

class Empty:
    name = "empty"

class Broken(NumpyPort):
    def denoise(self, *arguments):
        raise RuntimeError("no kernel for this shape")

EMPTY, BROKEN = Empty(), Broken()
SILU = TrainingPort(FAULTS[0])
"""


def run(*arguments, cwd):
    environment = {"PYTHONPATH": str(cwd), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def suite(*arguments, cwd, status=0):
    (cwd / "adapter.py").write_text(ADAPTER)
    done = run("-m", "pytest", "--pyargs", "conformance", "-q", *arguments, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_port_from_the_docs_is_proved_and_reported(tmp_path):
    name = "conformance.examples.numpy_port:PORT"
    suite("--strict-markers", "--port", name, "--report", "out", "-k", "seeds or fresh or training", cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    outcomes = {result["case"]: result["outcome"] for result in found["results"]}
    assert outcomes["fresh-network"] == outcomes["seeds"] == "passed"
    assert outcomes["training"] == outcomes["golden-training"] == "not implemented"
    assert found["subjects"][name]["library"].startswith("numpy ")
    assert "| clause | numpy_port |" in (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not implemented: train(config" in page
    assert not re.search(r'(src|href)="', page)
    assert set(re.findall(r'data-port="([^"]*)"', page)) == {"numpy_port"}  # what a phone shows beside each cell
    assert "| STEP-2 order | not implemented |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("port", "status", "says"),
    [
        ("nowhere:PORT", 4, "port nowhere:PORT cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("adapter:NONE", 4, "port adapter:NONE cannot be imported: AttributeError"),
        ("tensorflow", 4, "a port must be one of"),
        ("adapter:EMPTY", 1, "conformance failed: port adapter:EMPTY skipped every case"),
    ],
)
def test_a_port_that_proves_nothing_fails(tmp_path, port, status, says):
    assert says in suite("--port", port, cwd=tmp_path, status=status)


def test_a_port_that_was_asked_for_and_ran_nothing_fails(tmp_path):
    text = suite("--port", "conformance.examples.numpy_port:PORT", "-k", "nosuchcase", cwd=tmp_path, status=1)
    assert "ran nothing" in text


def test_a_failure_stands_alone_and_its_line_reproduces_it(tmp_path):
    suite("--port", "adapter:SILU", "-k", "denoise and not golden", "--report", "out", cwd=tmp_path, status=1)
    (result,) = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    words = result["failure"]
    assert result["worst"] > 1
    assert words["function"].startswith("adapter:SILU: denoise(config, params, x, sigma")
    assert "NetworkConfig(img_resolution=" in words["inputs"]
    assert "where the difference is largest" in words["got"]
    assert "eps (4 layers + 8)" in words["tolerance"]
    again = run(*shlex.split(words["reproduce"])[1:], cwd=tmp_path)
    assert again.returncode == 1
    assert words["summary"] in again.stderr
    right = words["reproduce"].replace("adapter:SILU", "conformance.examples.numpy_port:PORT")
    assert run(*shlex.split(right)[1:], cwd=tmp_path).returncode == 0


KNOWN = '[[failure]]\nid = "{}"\nreason = "no kernel"\nlink = "https://example.org/1"\nversions = {{numpy = "{}"}}\n'


@pytest.mark.parametrize(
    ("port", "case", "versions", "status", "says"),
    [
        ("adapter:BROKEN", "fresh-network", ">=1", 0, "1 xfailed"),
        ("adapter:BROKEN", "fresh-network", "<1", 1, "no kernel for this shape"),
        ("conformance.examples.numpy_port:PORT", "fresh-network", ">=1", 1, "XPASS(strict)"),
        ("adapter:BROKEN", "no-such-case", ">=1", 4, "no case is called 'no-such-case'"),
    ],
)
def test_known_failures_are_exact(tmp_path, port, case, versions, status, says):
    (tmp_path / "known.toml").write_text(KNOWN.format(case, versions))
    options = ("--port", port, "--known-failures", "known.toml", "-k", "fresh-network or seeds")
    assert says in suite(*options, cwd=tmp_path, status=status)


def test_an_entry_without_its_reason_is_refused(tmp_path):
    (tmp_path / "known.toml").write_text('[[failure]]\nid = "denoise"\n')
    with pytest.raises(known.KnownError, match="must list failures with id, reason, link and versions"):
        known.read("torch", str(tmp_path / "known.toml"))


def test_other_sessions_do_not_notice_the_plugin(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import sys\ndef test(): assert 'hypothesis.strategies' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = run("-m", "pytest", "-q", "-p", "no:hypothesispytest", "test_theirs.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_run_that_proved_nothing_fails():
    def results(*outcomes):
        return [{"subject": "a", "outcome": outcome} for outcome in outcomes]

    assert shortfall(results("passed", "not checked"), ["a"], []) is None
    assert shortfall([], [], []) is None
    assert "ran nothing" in shortfall(results("passed"), ["b"], [])
    assert "skipped every case" in shortfall(results("not implemented"), ["a"], [])
    assert "every case was skipped" in shortfall(results("not checked"), [], [])
    assert "1 skipped though golden numbers are there" in shortfall(results("passed"), [], ["x"])


def test_examples_travel_as_text():
    example = {"config": FEW_CONFIGS[0], "seed": 5, "betas": (0.9, 0.99), "same": True, "w": 0.25}
    assert contract.from_json(contract.to_json(example)) == example


def test_the_table_goes_between_its_marks(tmp_path):
    source, target = tmp_path / "report.json", tmp_path / "README.md"
    result = {"subject": "a", "outcome": "passed", "clauses": ["NET-5"], "worst": 0.25, "comparisons": 1,
              "examples": 4, "why": "", "case": "denoise", "failure": {}}  # fmt: skip
    data = {"versions": {"suite": "1", "spec": "1", "python": "3"}, "profile": "ci", "machine": "m", "absent": {},
            "subjects": {"a": {"port": "1", "library": "l 2"}}, "clauses": [{"number": "NET-5"}],
            "results": [result, result | {"outcome": "failed", "worst": 2.0}]}  # fmt: skip
    source.write_text(json.dumps(data))
    target.write_text(f"before\n{report.START}\nstale\n{report.END}\nafter\n")
    report.insert(source, target)
    text = target.read_text()
    assert "| NET | FAILED 2 · 2.00 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text


def test_two_ports_of_one_name_are_called_as_they_were_asked_for():
    subjects = {"a:PORT": {"name": "mine"}, "b:PORT": {"name": "mine"}, "c:PORT": {"name": "theirs"}, "d": {}}
    names = report.headings({"subjects": subjects}, ["core", *subjects])
    assert names == ["specification", "a:PORT", "b:PORT", "theirs", "d"]


def test_the_page_of_wrong_ports_is_theirs():
    page = (Path(__file__).parents[1] / "docs" / "wrong_ports.md").read_text()
    rows = [f"| {fault.name} | {fault.says} | `{fault.caught_by}` |" for fault in FAULTS]
    assert [row for row in rows if row not in page] == []
    assert page.count("\n| ") == len(rows) + 2
    assert "NOTHING" not in page
