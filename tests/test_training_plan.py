"""Snapshot plans in the training loop: followed through stops, by every process, and refused beside other options."""

import pytest
from test_training_loop import stopping, stored
from toy_port import ToySampler, ToyTrainer, together
from toy_port import train_toy as train

from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import parse_train
from backends.pipeline.runs.resolve import open_data, resolve
from backends.pipeline.runs.training import train as run_api
from edm2_core.ema import OpenPlan, plan_snapshots
from edm2_core.errors import InputError
from edm2_core.network import plan as parameters_of

pytestmark = pytest.mark.usefixtures("toy")


def planned(tmp_path, duration):
    plan = plan_snapshots(files=8 if duration else 4, sigma_rel_range=(0.03, 0.2), duration=duration, batch=64)
    (tmp_path / "plan.json").write_text(plan.to_json())
    return plan, tmp_path / "plan.json"


@pytest.mark.parametrize("stop", [None, 2048])
def test_a_plan_is_followed_also_through_a_stop(tmp_path, stop):
    plan, path = planned(tmp_path, 4096)
    train(snapshot_plan=path, duration=4096, trainer=stopping(stop) if stop else ToyTrainer)
    _, _, run = train()
    wanted = {(t // 1000, s) for s, times in zip(plan.sigma_rels, plan.times, strict=True) for t in times}
    assert {(nimg // 1000, s) for nimg, s in stored(run)} == wanted
    assert run.config().hyper.sigma_rels == plan.sigma_rels
    assert run.config().snapshot_plan == plan


def test_an_open_plan_is_followed_and_what_is_stale_goes(tmp_path):
    plan, path = planned(tmp_path, None)
    _, _, run = train(snapshot_plan=path, duration=32768)
    found = stored(run)
    assert len(found) <= plan.files
    assert {s for nimg, s in found if nimg == 32768} == set(plan.sigma_rels)
    assert not plan.stale(found)
    first = min(nimg for nimg, _ in found)
    _, _, run = train(duration=65536)  # goes on with the same plan
    assert min(nimg for nimg, _ in stored(run)) > first
    assert len(stored(run)) <= plan.files


def test_a_snapshot_that_took_the_name_of_a_stale_one_stays(tmp_path):
    """Names count thousands of images: here many due times share one."""
    plan = OpenPlan(sigma_rels=(0.05, 0.1), ratio=1.05, kept=2, range=(0.03, 0.2))
    (tmp_path / "plan.json").write_text(plan.to_json())
    _, _, run = train(snapshot_plan=tmp_path / "plan.json", duration=1920)
    assert stored(run) == [(1920, 0.05), (1920, 0.1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duration": 8192}, "--duration must be that of the --snapshot-plan, 4096 images, got 8192"),
        ({"snapshot": 1024}, r"--snapshot-plan and --snapshot exclude each other, got both"),
        ({"sigma_rels": (0.05,)}, r"--snapshot-plan and --sigma-rels exclude each other, got both"),
    ],
)
def test_a_plan_stands_alone(tmp_path, options, message):
    _, path = planned(tmp_path, 4096)
    with pytest.raises(InputError, match=message):
        train(**({"snapshot_plan": path, "duration": 4096} | options))
    assert not Run("run").path.exists()


def test_another_plan_for_a_run_that_exists_is_refused(tmp_path):
    _, path = planned(tmp_path, 4096)
    train(snapshot_plan=path, duration=4096)
    train(snapshot_plan=path)  # the same one is no change
    _, path = planned(tmp_path, None)
    with pytest.raises(InputError, match="--snapshot-plan must stay"):
        train(snapshot_plan=path)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"plan\.json must be a plan"):
        train(snapshot_plan=tmp_path / "plan.json")
    with pytest.raises(InputError, match="which cannot be read"):
        train(snapshot_plan=tmp_path / "none.json")


def test_every_process_asks_for_the_averages_that_are_due_and_for_nothing_else(tmp_path):
    """Asking gathers arrays of all processes: each must ask, as often as the others."""
    asked = {0: [], 1: []}

    class Asked(ToyTrainer):
        def average(self, length, names=None, /):
            asked[self.rank].append((self.nimg, length.value, names))
            return super().average(length, names)

        def parameters(self, names=None, /):
            asked[self.rank].append((self.nimg, "weights", names))
            return super().parameters(names)

    plan, path = planned(tmp_path, 4096)
    words = (
        "--preset",
        "toy",
        "--data",
        "digits",
        "--snapshot-plan",
        str(path),
        "--duration",
        "4096",
        "--checkpoint",
        "4096",
    )
    options = parse_train(words, prog="train", description="")
    dataset = open_data(options)
    config = resolve(options, dataset)

    def work(team):
        def open_trainer(config, machine):
            return Asked(config, machine, team=team)

        run_api(config, dataset, open_trainer, ToySampler(), outdir="run", prog="train")

    together(work, 2)
    due = [(-(-t // 64) * 64, s) for s, times in zip(plan.sigma_rels, plan.times, strict=True) for t in times]
    assert asked[0] == asked[1]  # in one order, array by array
    names = parameters_of(config.network).parameters
    averages = [(nimg, length, name) for nimg, length, (name,) in asked[0][: -len(names)]]
    assert sorted(averages) == sorted((*one, name) for one in due for name in names)
    assert asked[0][-len(names) :] == [(4096, "weights", [name]) for name in names]  # for the picture
