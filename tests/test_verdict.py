"""The verdict of a report: which of several runs is better, and when that is chance."""

import numpy as np
import pytest
from report_runs import measurement
from toy_port import train_toy

from backends.pipeline.report.history import History
from backends.pipeline.report.verdict import Estimate, Measure, verdict
from backends.pipeline.runs.folder import Run


def row(left, right, *, higher=False):
    return Measure("loss", {"a": left, "b": right}, higher).row(["a", "b"])


def test_the_lowest_is_the_best_or_the_highest():
    lower = row(Estimate(1.0, 0.01), Estimate(2.0, 0.01))
    assert lower[2] == "<td>a, by 50.0%</td>"
    assert ['class="good"' in cell for cell in lower] == [True, False, False]
    assert row(Estimate(1.0, 0.01), Estimate(2.0, 0.01), higher=True)[2] == "<td>b, by 100.0%</td>"


def test_less_than_two_standard_errors_is_chance():
    error = 0.05 / np.sqrt(2)
    for apart, says in ((0.099, "no difference beyond chance"), (0.101, "a, by 9.2%")):
        assert row(Estimate(1.0, error), Estimate(1.0 + apart, error))[2] == f"<td>{says}</td>"


def test_without_errors_the_values_decide_and_equal_ones_are_the_same():
    assert row(Estimate(3.0), Estimate(2.0))[2] == "<td>b, by 33.3%</td>"
    assert row(Estimate(3.0), Estimate(3.0))[2] == "<td>the same</td>"


def test_the_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    estimate = Estimate.of(np.append(values, np.nan))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(0.1, rel=0.1)
    assert Estimate.of(np.array([np.nan])) is None


def test_runs_of_different_losses_are_compared_by_the_unweighted_one(toy):
    train_toy("one", status=64)
    train_toy("two", status=64, P_mean=-0.8)
    for name, value in (("one", 1.0), ("two", 2.0)):
        for nimg in range(0, 3600, 128):  # the last measurement is before the last tenth
            Run(name).append_telemetry(measurement(nimg, value=value))
    (section,) = verdict({name: History.of(Run(name)) for name in ("one", "two")})
    assert "the training losses have different weights" in section.body.lower()
    assert '<td class="good">0.7071 ± 0</td><td>1 ± 0</td><td>one, by 29.3%</td>' in section.body
    assert '<th scope="row">training loss</th>' not in section.body
