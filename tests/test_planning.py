"""Snapshot plans: better than four times as many uniform files, followed at any step size, and stored without loss."""

import json
import re
from itertools import combinations, pairwise

import numpy as np
import pytest

from backends.commands.cli import main
from edm2_core.ema import (
    OpenPlan,
    TimedPlan,
    plan_from_json,
    plan_snapshots,
    reconstruction_error,
    uniform_plan,
    worst_error,
)
from edm2_core.ema.planning import _greedy
from edm2_core.errors import InputError

Gi = 1 << 30
DENSE = np.geomspace(0.015, 0.25, 61)  # not the lengths that plans look at
RANGE = (0.015, 0.25)


@pytest.mark.parametrize("files", [4, 16, 32, 64])
def test_a_plan_is_better_than_four_times_as_many_uniform_files(files):
    snapshot_plan = plan_snapshots(files=files, sigma_rel_range=RANGE, duration=2 * Gi, batch=2048)
    assert snapshot_plan.files <= files
    assert len(snapshot_plan.sigma_rels) <= 3
    usual = uniform_plan(files=4 * files, duration=2 * Gi)
    assert usual.files == 4 * files
    ours, theirs = snapshot_plan.error(DENSE).total.max(), usual.error(DENSE).total.max()
    assert ours < 0.4 * theirs  # seen: 0.13 to 0.36 of it
    assert ours == pytest.approx(worst_error(snapshot_plan), rel=0.1)


def test_the_error_of_a_plan_is_that_of_what_it_stores():
    snapshot_plan = plan_snapshots(files=16, sigma_rel_range=RANGE, duration=100_000_000, batch=512)
    times, lengths = snapshot_plan.stored_at(snapshot_plan.duration)
    assert len(times) == snapshot_plan.files
    assert (times % 512 == 0).all() or (times[times % 512 != 0] == snapshot_plan.duration).all()
    error = reconstruction_error(
        in_time=times, in_sigma_rel=lengths, out_time=float(snapshot_plan.duration), out_sigma_rel=DENSE
    )
    assert np.array_equal(error.total, snapshot_plan.error(DENSE).total)


def test_more_files_and_more_lengths_do_not_harm():
    errors = [worst_error(plan_snapshots(files=n, sigma_rel_range=RANGE, duration=Gi)) for n in (4, 8, 16, 32)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors))
    two = plan_snapshots(files=16, sigma_rel_range=RANGE, duration=Gi, max_lengths=2)
    assert len(two.sigma_rels) == 2
    assert errors[2] < worst_error(two)


def test_the_greedy_choice_is_near_the_best_of_all():
    times, lengths, wanted = np.linspace(0.4, 1, 5), (0.02, 0.2), np.geomspace(0.02, 0.2, 8)

    def error(pairs):
        t, s = np.array([times[i] for i, _ in pairs]), np.array([lengths[j] for _, j in pairs])
        if t.max() < 1:
            return np.inf
        return reconstruction_error(in_time=t, in_sigma_rel=s, out_time=1.0, out_sigma_rel=wanted).total.max()

    everything = [(i, j) for i in range(5) for j in range(2)]
    best = min(error(pairs) for pairs in combinations(everything, 4))
    worst = max(e for e in map(error, combinations(everything, 4)) if e < np.inf)
    greedy = error(list(_greedy(times, lengths, wanted, 4, 2.0**-10)))
    assert best <= greedy < best + 0.1 * (worst - best)


@pytest.mark.parametrize("batch", [1, 128, 5000])
def test_every_planned_file_is_due_once_at_any_step_size(batch):
    snapshot_plan = plan_snapshots(files=12, sigma_rel_range=RANGE, duration=1_000_000, batch=5000)
    steps = range(0, snapshot_plan.duration + batch, batch)
    due = [(now, s) for before, now in pairwise(steps) for s in snapshot_plan.due(before, now)]
    assert len(due) == snapshot_plan.files
    planned = sorted(
        (t, s) for s, times in zip(snapshot_plan.sigma_rels, snapshot_plan.times, strict=True) for t in times
    )
    assert all(0 <= now - t < batch and s == s_ for (now, s), (t, s_) in zip(sorted(due), planned, strict=True))
    names = [(now // 1000, s) for now, s in due]
    assert len(set(names)) == len(names)  # each a file of its own
    assert snapshot_plan.stale(due) == []


def test_an_open_plan_keeps_within_its_budget_and_is_good_wherever_the_run_ends():
    """Compared with uniform files of twice the budget at the very end, which no run of unknown end could have had."""
    files = 32
    snapshot_plan = plan_snapshots(files=files, sigma_rel_range=RANGE)
    assert snapshot_plan.files <= files
    generator, stored, now, batch = np.random.default_rng(0), [], 0, 2048
    bar = uniform_plan(files=2 * files, duration=Gi).error(DENSE).total.max()
    checked = 0
    for _ in range(4000):
        before, now = now, now + batch
        stored += [(now, s) for s in snapshot_plan.due(before, now)]
        stored = [pair for pair in stored if pair not in snapshot_plan.stale(stored)]
        assert len(stored) <= files
        if now > 2_000_000 and generator.random() < 0.01:
            final = stored + [(now, s) for s in snapshot_plan.due(now - batch, now, end=True) if (now, s) not in stored]
            final = [pair for pair in final if pair not in snapshot_plan.stale(final)]
            assert len(final) <= files
            t, s = np.array(final, np.float64).T
            error = reconstruction_error(in_time=t, in_sigma_rel=s, out_time=float(now), out_sigma_rel=DENSE)
            assert error.total.max() < bar
            assert error.total.max() < 1.5 * worst_error(snapshot_plan)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("duration", [None, 1500, 90_000])
def test_a_plan_survives_its_file_and_is_made_the_same_again(duration):
    make = {"files": 9 if duration else 4, "sigma_rel_range": (0.03, 0.2), "duration": duration, "batch": 128}
    snapshot_plan = plan_snapshots(**make)
    assert plan_from_json(snapshot_plan.to_json(), name="plan.json") == snapshot_plan == plan_snapshots(**make)
    assert isinstance(snapshot_plan, OpenPlan if duration is None else TimedPlan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": 0}, "files must be at least 1, got 0"),
        ({"files": 1, "duration": None}, "files must be at least 2 where the end is unknown"),
        ({"max_lengths": 0}, "max_lengths must be at least 1"),
        ({"sigma_rel_range": (0.1, 0.3)}, r"within \(0, 0\.2887\), got 0\.3"),
        ({"sigma_rel_range": (0.2, 0.1)}, "from the shorter to the longer, got 0.2-0.1"),
        ({"duration": 0}, "duration must be at least 1000 images, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32"),
    ],
)
def test_impossible_requests_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        plan_snapshots(**({"files": 8, "sigma_rel_range": RANGE, "duration": Gi} | change))


def changed(**values):
    snapshot_plan = TimedPlan(duration=9000, sigma_rels=(0.05, 0.1), times=((5000, 9000), (9000,)), range=(0.03, 0.2))
    return json.dumps(json.loads(snapshot_plan.to_json()) | values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        changed(format="other"),
        changed(times=[[9000, 5000], [9000]]),
        changed(times=[[9000]]),
        changed(times=[[0, 9000], [9000]]),
        changed(times=[[5000, 9001], [9000]]),
        changed(sigma_rels=[0.05, 0.0501]),
        changed(sigma_rels=[0.05, 0.5]),
        changed(range=[0.1]),
        changed(extra=1),
        changed(dtype="int8"),
        changed(version=2),
        changed(version=True),
        changed(times=[[float("inf")], [9000]]),
        changed(times=[[5000.7, 9000], [9000]]),
        changed(times=["59", [9000]]),
        changed(times=[[], []]),
        changed(times=[[5000], [6000]]),
        changed(times=[[5000, 5001, 9000], [9000]]),
        changed(duration=float("inf")),
        changed(duration=9000.0),
        changed(range=[0.2, 0.03]),
        changed(range=[0.03, 0.1, 0.2]),
        "[" * 100_000,
    ],
)
def test_what_is_no_plan_is_refused_by_name(text):
    with pytest.raises(InputError, match=r"^plan\.json must be a plan") as caught:
        plan_from_json(text, name="plan.json")
    assert len(str(caught.value).splitlines()) == 1


def test_the_command_prints_a_table_draws_it_and_writes_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--files", "12", "--range", "0.02-0.25", "--duration", "1Gi", "--parameters", "1000000"]) == 0
    out = capsys.readouterr().out
    snapshot_plan = plan_from_json((tmp_path / "snapshot-plan.json").read_text(), name="")
    assert isinstance(snapshot_plan, TimedPlan)
    assert snapshot_plan.duration == Gi
    assert re.search(rf"^plan +{snapshot_plan.files} +24 MB +{worst_error(snapshot_plan):.4f}$", out, re.MULTILINE)
    assert "uniform, 48 files" in out
    assert (tmp_path / "snapshot-plan.png").stat().st_size > 10_000
    assert main(["plan", "--files", "12", "--duration", "any", "--out", "open.json"]) == 0
    assert isinstance(plan_from_json((tmp_path / "open.json").read_text(), name=""), OpenPlan)
    assert main(["plan", "--duration", "soon"]) == 2
    assert (
        "--duration must be a whole number of images such as 192Ki or 2Gi, or 'any', got 'soon'"
        in capsys.readouterr().err
    )
