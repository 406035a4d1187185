"""The suite from outside: options, exit status, messages, reports, and pytest runs of other projects beside it."""

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

EMPTY, BROKEN, RIGHT = Empty(), Broken(), NumpyPort()
SILU = TrainingPort(FAULTS[0])
"""


def run(*arguments, cwd):
    environment = {"PYTHONPATH": str(cwd), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def suite(*arguments, cwd, status=0):
    (cwd / "adapter.py").write_text(ADAPTER)
    done = run("-m", "conformance", "-q", *arguments, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def theirs(folder, files, *arguments):
    """Run pytest in a project of someone else, its files given as text: the exit status and the output."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    done = run("-m", "pytest", "-q", "--strict-markers", *arguments, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def test_a_port_from_the_docs_is_proved_and_reported(tmp_path):
    name = "conformance.examples.numpy_port:PORT"
    suite("--strict-markers", "--port", name, "--report", "out", "-k", "seeds or fresh or training", cwd=tmp_path)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    outcomes = {result["case"]: result["outcome"] for result in written["results"]}
    assert outcomes["fresh-network"] == outcomes["seeds"] == "passed"
    assert outcomes["training"] == outcomes["golden-training"] == "not implemented"
    assert written["subjects"][name]["library"].startswith("numpy ")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| clause | numpy_port |" in text
    assert "| STEP-2 order | not implemented |" in text
    assert re.search(r"- STEP-2: .*`training`, `golden-training` of each port; the right port is right", text)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not implemented: train(config" in page
    assert not re.search(r'(src|href)="', page)
    assert set(re.findall(r'data-port="([^"]*)"', page)) == {"numpy_port"}  # shown beside each cell on narrow screens


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


OTHER_PLUGIN = """
def pytest_addoption(parser):  # as pytest-profiling and pytest-reporter do
    parser.addoption("--profile", action="store_true", dest="profile")
    parser.addoption("--report", action="append", dest="report")
"""
OPTIONS = """
import pytest
def pytest_addoption(parser):
    for name in ("--port", "--ports", "--report", "--known-failures", "--case"):
        parser.addoption(name)
@pytest.fixture
def port(request):
    return request.config.getoption("--port")
"""
beside_the_plugin = pytest.mark.parametrize("plugin", [(), ("-p", "conformance.plugin")], ids=["without", "with"])


@beside_the_plugin
def test_plugins_of_others_keep_their_options(tmp_path, plugin):
    files = {
        "other_plugin.py": OTHER_PLUGIN,
        "test_theirs.py": "def test(request):\n"
        "    assert request.config.getoption('profile')\n    assert request.config.getoption('report') == ['x']\n",
    }
    status, output = theirs(tmp_path, files, "-p", "other_plugin", *plugin, "--profile", "--report", "x")
    assert (status, "1 passed" in output) == (0, True), output


@beside_the_plugin
def test_a_conftest_of_others_keeps_its_options_and_fixtures(tmp_path, plugin):
    files = {"conftest.py": OPTIONS, "test_theirs.py": "def test(port): assert port == '8080'\n"}
    status, output = theirs(tmp_path, files, *plugin, "--port", "8080", "--report", "x")
    assert (status, "1 passed" in output) == (0, True), output


def test_a_folder_of_others_named_conformance_runs(tmp_path):
    files = {"conformance/__init__.py": "", "conformance/test_theirs.py": "def test(): pass\ndef test_too(): pass\n"}
    for arguments in ((), ("conformance",)):
        status, output = theirs(tmp_path, files, *arguments)
        assert (status, "2 passed" in output) == (0, True), output


@beside_the_plugin
@pytest.mark.parametrize("fixture", ["port", "record"])
def test_a_missing_fixture_of_others_is_reported(tmp_path, plugin, fixture):
    status, output = theirs(tmp_path, {"test_theirs.py": f"def test({fixture}): pass\n"}, *plugin)
    assert (status, f"fixture '{fixture}' not found" in output) == (1, True), output


@beside_the_plugin
def test_runs_of_others_import_nothing_of_the_suite(tmp_path, plugin):
    heavy = "{'hypothesis.strategies', 'numpy', 'conformance.cases', 'edm2_core'}"
    files = {"test_theirs.py": f"import sys\ndef test(): assert not {heavy} & set(sys.modules)\n"}
    others = ("-p", "no:hypothesispytest", "-p", "no:jaxtyping", "-p", "no:anyio")  # plugins that import NumPy
    status, output = theirs(tmp_path, files, *others, *plugin)
    assert status == 0, output


def test_the_suite_without_its_plugin_says_what_to_add(tmp_path):
    status, output = theirs(tmp_path, {}, "--pyargs", "conformance")
    assert (status, "add -p conformance.plugin" in output) == (2, True), output


def test_pytest_runs_the_suite_as_the_command_does(tmp_path):
    (tmp_path / "adapter.py").write_text(ADAPTER)
    options = ("--edm2-port", "adapter:RIGHT", "--edm2-profile", "ci", "--edm2-report", "out", "-k", "no-label")
    status, output = theirs(tmp_path, {}, "--pyargs", "conformance", "-p", "conformance.plugin", *options)
    assert (status, "1 passed" in output) == (0, True), output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["profile"] == "ci"


def test_a_run_that_proved_nothing_fails():
    def results(*outcomes):
        return [{"subject": "a", "outcome": outcome} for outcome in outcomes]

    assert shortfall(results("passed", "not checked"), ["a"], []) is None
    assert shortfall([], [], []) is None
    assert "ran nothing" in shortfall(results("passed"), ["b"], [])
    assert "skipped every case" in shortfall(results("not implemented"), ["a"], [])
    assert "every case was skipped" in shortfall(results("not checked"), [], [])
    assert "1 skipped although the golden numbers are there" in shortfall(results("passed"), [], ["x"])


def test_examples_travel_as_text():
    example = {
        "config": FEW_CONFIGS[0],
        "other": FEW_CONFIGS[1],
        "seed": 5,
        "betas": (0.9, 0.99),
        "same": True,
        "w": 0.25,
    }
    assert contract.from_json(contract.to_json(example)) == example


def test_the_table_goes_between_its_marks(tmp_path):
    source, target = tmp_path / "report.json", tmp_path / "README.md"
    result = {"subject": "a", "outcome": "passed", "clauses": ["NET-5"], "worst": 0.25, "comparisons": 1,
              "examples": 4, "why": "", "case": "denoise", "failure": {}}  # fmt: skip
    data = {"versions": {"suite": "1", "spec": "1", "python": "3"}, "profile": "ci", "machine": "m", "absent": {},
            "subjects": {"a": {"port": "1", "library": "l 2"}}, "clauses": [{"number": "NET-5", "cases": []}],
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
