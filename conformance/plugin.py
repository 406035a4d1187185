"""The suite as a pytest plugin: options, the ports to test, the verdict on a run, and the report.

The plugin is opt-in, ``pytest --pyargs conformance -p conformance.plugin --edm2-port ...``; ``python -m conformance``
loads it by itself. Options and fixtures carry the prefix ``edm2``. Other tests are not affected, and
nothing heavy is imported until one of the suite's is collected.

Under pytest-xdist the workers collect and run; results go to the controller, which writes the one report.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
_KEY = pytest.StashKey["Session"]()
_RECORD = pytest.StashKey[Any]()
CORE = "core"


class Session:
    """The ports that were asked for, those that can run, and the results so far."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.asked: list[str] = config.getoption("edm2_ports") or []
        self.subjects: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        self.error: str | None = None
        self.results: list[dict[str, Any]] = []
        self.missed: list[str] = []  # tests that skipped although the golden numbers are there
        self.started = False

    def start(self) -> None:
        """Select the profile and load the ports, before the first test of the suite is imported."""
        if self.started:
            return
        self.started = True
        from conformance import ports, profiles

        profiles.load(self.config.getoption("edm2_profile"))
        sys.path.append(str(self.config.invocation_params.dir))  # as python -m does: ports in the current folder
        try:
            if self.asked:
                self.subjects = {name: ports.load(name) for name in dict.fromkeys(self.asked) if name != CORE}
            else:
                self.subjects, self.absent = ports.available()
        except ports.PortError as error:
            self.error = str(error)

    def check(self) -> None:
        """Raises UsageError, which ends the run, where a port cannot be used."""
        if self.error:
            raise pytest.UsageError(self.error)

    def verdict(self) -> str | None:
        """See :func:`shortfall`."""
        if not self.started:
            return None
        needed = self.asked
        if not needed and not self.config.getoption("keyword"):
            ran = {result["subject"] for result in self.results}
            needed = [name for name in self.subjects if name in ran]
        return shortfall(self.results, needed, self.missed)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "EDM2 conformance suite")
    group.addoption(
        "--edm2-port",
        action="append",
        dest="edm2_ports",
        metavar="NAME",
        help="prove this port: a registered name, package.module:ATTRIBUTE, or 'core', the specification itself; may "
        "be repeated. Default: the specification and every registered port that can run here",
    )
    profiles = ("dev", "ci", "deep")
    group.addoption("--edm2-profile", choices=profiles, default="dev", help="20, 100 or 2000 examples per case")
    group.addoption("--edm2-known-failures", metavar="FILE", help="TOML of known failures, see docs/adding_a_port.md")
    group.addoption("--edm2-report", metavar="FOLDER", help="write report.json, report.md and report.html there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Session(config)


def _ours(path: Path) -> bool:
    return HERE in path.parents


def _params(item: pytest.Item) -> dict[str, Any]:
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return params


def _subject_of(item: pytest.Item) -> str | None:
    """The name of the port that the test runs on, ``core``, or None: a test of ports where there is none."""
    name: str | None = _params(item).get("edm2_port", CORE)
    return name


# ---- which tests run


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module) and _ours(collector.path):
        collector.config.stash[_KEY].start()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "edm2_port" in metafunc.fixturenames and _ours(Path(str(metafunc.module.__file__))):
        session = metafunc.config.stash[_KEY]
        none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="no port is installed"))
        names = [pytest.param(name, id=name) for name in session.subjects] or [none]
        metafunc.parametrize("edm2_port", names, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    session = config.stash[_KEY]
    session.check()
    ours = [item for item in items if _ours(item.path)]
    if not ours:
        return
    unwanted = {item for item in ours if session.asked and _subject_of(item) not in session.asked}
    if unwanted:
        config.hook.pytest_deselected(items=list(unwanted))
        items[:] = [item for item in items if item not in unwanted]
    _mark_known(session, [item for item in ours if item not in unwanted])


def _mark_known(session: Session, items: list[pytest.Item]) -> None:
    """Known failures must fail: one that passes, or whose id no case has, is an error."""
    from conformance import known

    file = session.config.getoption("edm2_known_failures")
    try:
        tables = {name: known.read(name, file) for name in session.subjects}
    except known.KnownError as error:
        raise pytest.UsageError(str(error)) from error
    for item in items:
        table, case = tables.get(_subject_of(item) or ""), _params(item).get("case")
        if table and case is not None and (failure := table.get(case.name)):
            item.add_marker(pytest.mark.xfail(strict=True, reason=f"{failure.reason} ({failure.link})"))


# ---- one test


@pytest.fixture(scope="session")
def edm2_port(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The port under test.

    PyTorch, where it is loaded, computes on one thread meanwhile: in networks this small its threads mostly wait.
    """
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield request.config.stash[_KEY].subjects[request.param]
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def edm2_record(request: pytest.FixtureRequest) -> Any:
    """The comparisons of this test so far."""
    return request.node.stash[_RECORD]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    if _ours(item.path):
        from conformance import measure

        item.stash[_RECORD] = measure.Record()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Record comparisons; skip, with the reason, a case whose member, oracle or golden numbers are missing."""
    if not _ours(item.path):
        return (yield)
    from conformance import golden, measure
    from conformance.oracle import OracleMissing
    from conformance.ports import NotImplementedByPort

    case, subject = _params(item).get("case"), item.config.stash[_KEY].subjects.get(_subject_of(item) or "")
    with measure.recording(item.stash[_RECORD]):
        try:
            if subject and case is not None:
                subject.member(case.member)
                if case.golden and not golden.FOLDER.is_dir():
                    pytest.skip(golden.REASON)
            return (yield)
        except OracleMissing as error:
            pytest.skip(f"not checked: {error}")
        except NotImplementedByPort as error:
            pytest.skip(str(error))
        except measure.Disagreement as error:
            item.stash[_RECORD].failure = {"summary": error.summary, **error.words}
            raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if _ours(item.path) and (report.when == "call" or report.outcome != "passed"):
        report.user_properties.append(("conformance", _result(item, report)))
    return report


def _result(item: pytest.Item, report: pytest.TestReport) -> dict[str, Any]:
    """One line of the report."""
    from conformance.clauses import clauses_of

    record, case, subject = item.stash[_RECORD], _params(item).get("case"), _subject_of(item)
    outcome: str = report.outcome
    why = ""
    if report.skipped:
        words: Any = report.longrepr
        why = str(getattr(report, "wasxfail", "") or words[-1]).removeprefix("Skipped: ")
        outcome = "known failure" if hasattr(report, "wasxfail") else "not checked"
        outcome = "not implemented" if why.startswith("not implemented") else outcome
    failure = dict(record.failure)
    if outcome == "failed" and not failure:
        failure = {"summary": str(report.longrepr).strip().splitlines()[-1], "inputs": report.nodeid}
    return {
        "subject": subject or "none",
        "case": case.name if case is not None and subject != CORE else item.name.removeprefix("test_"),
        "clauses": [*clauses_of(getattr(item, "function", None)), *clauses_of(case)],
        "outcome": outcome,
        "why": why,
        "examples": record.examples,
        "comparisons": record.comparisons,
        "worst": record.worst if record.worst < float("inf") else None,
        "at": record.at,
        "seconds": round(report.duration, 2),
        "failure": failure if outcome in ("failed", "known failure") else {},
    }


# ---- the whole run


_session: Session | None = None  # pytest_runtest_logreport is not given the config


def pytest_sessionstart(session: pytest.Session) -> None:
    global _session
    _session = session.config.stash[_KEY]
    if _session.asked:  # a port that cannot be used ends the run at once, in the controller of pytest-xdist too
        _session.start()
        _session.check()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _session is None:
        return
    for name, result in report.user_properties:
        if name == "conformance" and isinstance(result, dict):
            from conformance import golden

            _session.start()  # the controller of pytest-xdist collects nothing
            _session.results.append(result)
            if golden.present and golden.REASON in result["why"]:
                _session.missed.append(report.nodeid)


def shortfall(results: list[dict[str, Any]], needed: list[str], missed: list[str]) -> str | None:
    """Why a run without failures proves nothing, or None. ``needed`` names the ports that must have run."""
    ran = Counter(result["subject"] for result in results if result["outcome"] in ("passed", "failed"))
    for name in needed:
        if not ran[name]:
            skipped = any(result["subject"] == name for result in results)
            return f"port {name} {'skipped every case' if skipped else 'ran nothing'}: nothing is proved of it"
    if results and not ran:
        return "every case was skipped: install a library or a port to test"
    if missed:
        return f"{len(missed)} skipped although the golden numbers are there, such as {missed[0]}"
    return None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash[_KEY]
    if not state.started or session.config.getoption("collectonly") or hasattr(session.config, "workerinput"):
        return
    empty = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if session.exitstatus in empty and state.verdict():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if folder := session.config.getoption("edm2_report"):
        from conformance import report

        report.write(Path(folder), report.of(state))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[_KEY]
    if not state.started:
        return
    for name, missing in state.absent.items():
        terminalreporter.write_line(f"port {name} is absent: {missing}")
    if why := state.verdict():
        terminalreporter.write_line(f"conformance failed: {why}", red=True)
    if folder := config.getoption("edm2_report"):
        terminalreporter.write_line(f"report: {Path(folder, 'report.html')}")
