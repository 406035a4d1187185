"""The suite as a pytest plugin: options, which ports run, what counts as proof, and the report.

Installed with the package (entry point ``pytest11``), so that ``pytest --pyargs conformance --port ...`` knows its
options; it does nothing in sessions that collect none of the suite's tests, and imports nothing until one does.

Where pytest-xdist divides a session, its workers collect and ask; results come to the controller, which writes the one
report and judges it.
"""

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
    """What was asked for, what is there, and what came of it."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.asked: list[str] = config.getoption("ports") or []
        self.profile: str = config.getoption("profile")
        self.subjects: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        self.faults: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.missed: list[str] = []  # tests that skipped for no good reason
        self.started = False

    def start(self) -> None:
        """Once a test of the suite is about to be collected: profile, ports."""
        if self.started:
            return
        self.started = True
        from conformance import ports, profiles

        profiles.load(self.profile)
        try:
            if self.asked:
                self.subjects = {name: ports.load(name) for name in dict.fromkeys(self.asked) if name != CORE}
            else:
                self.subjects, self.absent = ports.found()
        except ports.PortError as error:
            self.faults.append(str(error))

    def check(self) -> None:
        """Raises UsageError, which ends the session, where a port cannot be used."""
        if self.faults:
            raise pytest.UsageError(self.faults[0])

    def takes(self, name: str) -> bool:
        return not self.asked or name in self.asked


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance", "EDM2 conformance suite")
    group.addoption(
        "--port",
        action="append",
        dest="ports",
        metavar="NAME",
        help="prove this port: a registered name, package.module:ATTRIBUTE, or 'core', the specification itself; may "
        "be repeated. Without it: the specification and every registered port that can run here",
    )
    group.addoption("--profile", choices=("dev", "ci", "deep"), default="dev", help="20, 100 or 2000 examples")
    group.addoption("--known-failures", metavar="FILE", help="TOML of failures that are known, see docs/adding_a_port")
    group.addoption("--report", metavar="FOLDER", help="write report.json, report.md and report.html there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEY] = Session(config)


def _ours(path: Path) -> bool:
    return HERE in path.parents


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module) and _ours(collector.path):
        collector.config.stash[_KEY].start()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "port" in metafunc.fixturenames and _ours(Path(str(metafunc.module.__file__))):
        session = metafunc.config.stash[_KEY]
        none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="no port is installed"))
        names = [pytest.param(name, id=name) for name in session.subjects] or [none]
        metafunc.parametrize("port", names, indirect=True)


def _subject_of(item: pytest.Item) -> str:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return (params["port"] or "none") if "port" in params else CORE


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    session = config.stash[_KEY]
    session.check()
    ours = [item for item in items if _ours(item.path)]
    if not ours:
        return
    unwanted = {item for item in ours if not session.takes(_subject_of(item)) and _subject_of(item) != "none"}
    if session.asked:
        unwanted |= {item for item in ours if _subject_of(item) == "none"}
    if unwanted:
        config.hook.pytest_deselected(items=list(unwanted))
        items[:] = [item for item in items if item not in unwanted]
    _mark_known(session, [item for item in ours if item not in unwanted])


def _mark_known(session: Session, items: list[pytest.Item]) -> None:
    """Known failures must fail: one that passes, or that no case has, is a fault."""
    from conformance import known

    given = session.config.getoption("known_failures")
    try:
        tables = {name: known.read(name, given) for name in session.subjects}
    except known.KnownError as error:
        raise pytest.UsageError(str(error)) from error
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "port" in params and params["port"] in tables and "case" in params:
            failure = tables[params["port"]].get(params["case"].name)
            if failure:
                item.add_marker(pytest.mark.xfail(strict=True, reason=f"{failure.reason} ({failure.link})"))


@pytest.fixture(scope="session")
def port(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The port of that name.

    PyTorch, for a port or as an oracle, computes on one thread meanwhile: in networks this small threads wait for each
    other, and on a busy machine for long.
    """
    import sys

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield request.config.stash[_KEY].subjects[request.param]
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Any:
    """What this case came to so far."""
    return request.node.stash[_RECORD]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Any:
    if _ours(item.path):
        from conformance import measure

        item.stash[_RECORD] = measure.Record()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Comparisons are recorded. A case that the port lacks a member for, or that lacks its oracle, says so instead."""
    if not _ours(item.path):
        return (yield)
    from conformance import golden, measure
    from conformance.oracle import OracleMissing
    from conformance.ports import NotImplementedByPort

    params = getattr(getattr(item, "callspec", None), "params", {})
    case, name = params.get("case"), params.get("port")
    if name and case is not None:
        try:
            item.config.stash[_KEY].subjects[name].require(case.needs)
        except NotImplementedByPort as error:
            pytest.skip(str(error))
        if case.golden and not golden.FOLDER.is_dir():
            pytest.skip(golden.REASON)
    with measure.recording(item.stash[_RECORD]):
        try:
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
    from conformance import cases

    record, params = item.stash[_RECORD], getattr(getattr(item, "callspec", None), "params", {})
    case: Any = params.get("case")
    clauses = cases.opening(getattr(item, "function").__doc__)  # noqa: B009
    if _subject_of(item) != CORE and case is not None:
        clauses = tuple(case.clauses.split())
    elif hasattr(case, "clause"):
        clauses = (*clauses, case.clause)
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
        "subject": _subject_of(item),
        "case": case.name if _subject_of(item) != CORE and case is not None else item.name.removeprefix("test_"),
        "clauses": list(clauses),
        "outcome": outcome,
        "why": why,
        "examples": record.examples,
        "comparisons": record.comparisons,
        "worst": record.worst if record.worst < float("inf") else None,
        "at": record.at,
        "seconds": round(report.duration, 2),
        "failure": failure if outcome in ("failed", "known failure") else {},
    }


_session: Session | None = None  # log reports do not carry the config


def pytest_sessionstart(session: pytest.Session) -> None:
    global _session
    _session = session.config.stash[_KEY]
    if _session.asked:  # whoever asks for a port hears at once that there is none, from the controller too
        _session.start()
        _session.check()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _session is None:
        return
    for name, result in report.user_properties:
        if name == "conformance":
            _session.start()  # a controller has collected nothing
            _session.results.append(result)  # type: ignore[arg-type]
            from conformance import golden

            if golden.present and golden.REASON in result["why"]:  # type: ignore[index]
                _session.missed.append(report.nodeid)


def shortfall(results: list[dict[str, Any]], asked: list[str], missed: list[str]) -> str | None:
    """Why a run without failures still proves nothing, or None."""
    ran = Counter(result["subject"] for result in results if result["outcome"] in ("passed", "failed"))
    for name in asked:
        if not ran[name]:
            seen = any(result["subject"] == name for result in results)
            return f"port {name} {'skipped every case' if seen else 'ran nothing'}: it is proved in no respect"
    if results and not ran:
        return "every case was skipped: install a library or a port to test"
    if missed:
        return f"{len(missed)} skipped though golden numbers are there, as {missed[0]}"
    return None


def _shortfall(session: Session) -> str | None:
    needed = session.asked or (list(session.subjects) if not session.config.getoption("keyword") else [])
    collected = {result["subject"] for result in session.results}
    needed = [name for name in needed if session.asked or name in collected]
    return shortfall(session.results, needed, session.missed) if session.started else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash[_KEY]
    if not state.started or session.config.getoption("collectonly") or hasattr(session.config, "workerinput"):
        return
    empty = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if session.exitstatus in empty and _shortfall(state):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if folder := session.config.getoption("report"):
        from conformance import report

        report.write(Path(folder), report.of(state))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[_KEY]
    if not state.started:
        return
    for name, missing in state.absent.items():
        terminalreporter.write_line(f"port {name} is absent: {missing}")
    if why := _shortfall(state):
        terminalreporter.write_line(f"conformance failed: {why}", red=True)
    if folder := config.getoption("report"):
        terminalreporter.write_line(f"report: {Path(folder, 'report.html')}")
