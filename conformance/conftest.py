"""Profiles, and the rule that a suite which proved nothing has failed."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from conformance import golden, ports

# No deadline: first calls compile. Drawing configs is slow by Hypothesis' standards, and right. Which lines ran
# explains nothing about arithmetic.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "phases": [phase for phase in Phase if phase is not Phase.explain],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", max_examples=20, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.load_profile("dev")

_outcomes: Counter[str] = Counter()
_missed: list[str] = []  # tests that skipped for no good reason


def shortfall(outcomes: Counter[str], missed: list[str]) -> str | None:
    """Why a run without failures still proves nothing, or None."""
    if outcomes["skipped"] and not outcomes["passed"] and not outcomes["failed"]:
        return "every conformance test was skipped: install a library or a port to test"
    if missed:
        return f"{len(missed)} skipped though golden numbers are there, or for want of any parameters, as {missed[0]}"
    return None


def pytest_runtest_logreport(report: Any) -> None:
    if "conformance" not in report.nodeid or not (report.when == "call" or report.skipped):
        return
    _outcomes[report.outcome] += 1
    why = str(report.longrepr) if report.skipped else ""
    if (golden.present and golden.REASON in why) or "empty parameter set" in why:
        _missed.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: Any) -> None:
    if session.exitstatus == pytest.ExitCode.OK and shortfall(_outcomes, _missed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if why := shortfall(_outcomes, _missed):
        terminalreporter.write_line(f"conformance failed: {why}", red=True)


@pytest.fixture(scope="session")
def port(request: Any) -> Iterator[Any]:
    """The PORT of the name that :data:`conformance.ports.each_port` gives.

    PyTorch, where a port brings it, computes on one thread meanwhile: in networks this small threads wait for each
    other, and on a busy machine for long.
    """
    found = ports.load(request.param)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield found
    if torch:
        torch.set_num_threads(threads)
