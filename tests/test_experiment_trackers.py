"""Experiment trackers hold what the files of a run hold, each line once, also when a run is resumed."""

import json
import os
import re
import shutil
import struct
import sys
from collections import defaultdict
from contextlib import chdir
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

import pytest
from toy_port import PROG, ToySampler, ToyTrainer, together, train_options, train_toy

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.report.history import History
from backends.pipeline.runs.evaluation import read_figures
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.resolve import configure
from backends.pipeline.runs.trackers import OPENED, TensorBoard, check_installed
from backends.pipeline.runs.training import run_training, train
from edm2_core.errors import InputError

pytest.importorskip("tensorboard", reason="tensorboard is not installed")
INSTALLED = [name for name in OPENED if find_spec(name)]  # not imported yet: Trackio then reads where it stores
BATCH = 32
TRAIN = (
    f"--outdir run --channels 8 --channel-mult 1 2 --blocks 1 --channels-per-head 8 --sigma-rels 0.1 --batch {BATCH} "
    "--status 64 --checkpoint 64 --keep 9 --holdout 0.03 --telemetry 2 --device cpu "
    "--evaluate 128 --evaluate-metric frechet@pixels --evaluate-images 8 --evaluate-steps 2"
).split()
CLOCKS = ("seconds", "images_per_s")  # which differ when a step is repeated


def stored_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run/tensorboard")).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    (text,) = events.Tensors("config")
    return scalars, json.loads(text.tensor_proto.string_val[0]), [e.step for e in events.Images("lengths")]


def stored_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    scalars, pictures, ids, config = defaultdict(list), [], set(), {}
    for path in sorted(folder.glob("run/wandb/offline-run-*/*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            record = Record.FromString(data)
            ids.add(record.run.run_id)
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            row = {".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if any(name.startswith("lengths") for name in row):
                pictures.append(row["_step"])
            for name, value in row.items():
                if not name.startswith(("_", "lengths")):
                    scalars[name].append((row["_step"], value))
    assert len(ids - {""}) == 1
    return dict(scalars), {k: v for k, v in config.items() if not k.startswith("_")}, pictures


def leveldb_log(data, *, header=7, block=1 << 15):
    """Records in the format of LevelDB's log, after W&B's header."""
    position, whole = header, b""
    while position < len(data):
        if (left := block - position % block) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the only or the last part
            yield whole
            whole = b""


def stored_mlflow(folder):
    from mlflow import MlflowClient

    assert not (folder / "elsewhere/mlflow.db").exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("edm2").experiment_id])
    assert run.info.status == "FINISHED"
    scalars = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    names = [path.name for path in Path(run.info.artifact_uri).rglob("lengths*.png")]
    return (
        {name: [(m.step, m.value) for m in history] for name, history in scalars.items()},
        run.data.params,
        [int(re.search(r"step\D(\d+)", name)[1]) for name in names],
    )


def stored_trackio(folder):
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("edm2")
    scalars, pictures = defaultdict(list), []
    for row in SQLiteStorage.get_logs("edm2", run.name):
        for name, value in row.items():
            if name == "lengths":
                pictures.append(row["step"])
            elif name not in ("step", "timestamp"):
                scalars[name].append((row["step"], value))
    return dict(scalars), {k: v for k, v in run.config.items() if not k.startswith("_")}, pictures


STORED = {
    "tensorboard": stored_tensorboard,
    "wandb": stored_wandb,
    "mlflow": stored_mlflow,
    "trackio": stored_trackio,
}


def main(*argv):
    assert import_module("backends.torch.train").main([*TRAIN, "--log", *INSTALLED, *map(str, argv)]) == 0


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Where a run was logged to all trackers until it was killed at 192 images, and went on from 64 to 256."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            patch.delenv(name)
        offline = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        for name, value in (offline | {"TRACKIO_DIR": str(folder / "trackio")}).items():
            patch.setenv(name, value)
        main("--duration", 192, "--no-picture")
        for state in sorted(Run("run").states_path.iterdir())[1:]:
            shutil.rmtree(state)
        (folder / "elsewhere").mkdir()
        with chdir("elsewhere"):  # where MLflow has another local store by default
            main("--duration", 256, "--outdir", "../run")
    return folder


@pytest.fixture
def stored(logged, request):
    if request.param not in INSTALLED:
        pytest.skip(f"{request.param} is not installed")
    return STORED[request.param](logged)


of_each = pytest.mark.parametrize("stored", OPENED, indirect=True)


def numbers(line, but=()):
    return {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("nimg", *but)}


@of_each
def test_a_tracker_holds_each_line_of_the_log_once(logged, stored):
    log = Run(logged / "run").log()
    assert [line["nimg"] for line in log] == [64, 128, 192, 256]
    scalars, _, _ = stored
    for name in numbers(log[0]):
        assert [step for step, _ in scalars[name]] == [64, 128, 192, 256], name
    for name in numbers(log[0], CLOCKS):
        assert [value for _, value in scalars[name]] == pytest.approx([line[name] for line in log], rel=1e-6), name
    by_level = [line["holdout_by_sigma"] for line in log]
    for sigma, losses in zip(log[0]["holdout_sigma"], zip(*by_level, strict=True), strict=True):
        assert [value for _, value in scalars[f"holdout/sigma {sigma:.3g}"]] == pytest.approx(losses, rel=1e-6)


@of_each
def test_a_tracker_holds_telemetry_as_the_report_shows_it(logged, stored):
    telemetry, scalars = History.of(Run(logged / "run")).telemetry, stored[0]
    steps = [nimg + BATCH for nimg in telemetry.nimg]
    assert steps == [32, 96, 160, 224]
    assert {str(place) for place in telemetry.magnitudes["update"]} == {"Enc 8x8", "Enc 4x4", "Dec 4x4", "Dec 8x8"}
    for column, places in telemetry.magnitudes.items():
        for place, values in places.items():
            assert [step for step, _ in scalars[f"{column}/{place}"]] == steps
            assert [value for _, value in scalars[f"{column}/{place}"]] == pytest.approx(values, rel=1e-6, abs=1e-12)
    for sigma, losses in zip(telemetry.sigma, telemetry.loss.T, strict=True):
        known = {step: loss for step, loss in zip(steps, losses, strict=True) if isfinite(loss)}
        got = dict(scalars.get(f"loss by noise/sigma {sigma:.3g}", ()))
        assert got == pytest.approx(known, rel=1e-6)


@of_each
def test_a_tracker_holds_figures_pictures_and_the_config(logged, stored):
    run, (scalars, config, pictures) = Run(logged / "run"), stored
    first = {}
    for line in read_figures(run.path / "figures.jsonl"):
        first.setdefault(line["nimg"], line["figures"]["frechet@pixels"])
    (name,) = {name for name in scalars if re.fullmatch("frechet[@_]pixels/0.1", name)}
    assert dict(scalars[name]) == pytest.approx(first, rel=1e-6)
    assert len(scalars[name]) == len(first) == 3
    assert pictures == [256]
    flat = config if "network" in config else {"network": {"model_channels": config["network.model_channels"]}} | config
    assert (int(flat["batch"]), int(flat["network"]["model_channels"])) == (BATCH, 8)


def losses(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    return {event.step: event.value for event in events.Scalars("loss")}, len(events.Scalars("loss"))


def assert_holds_the_log(run):
    stored, count = losses(run)
    assert count == len(stored)
    assert stored == pytest.approx({line["nimg"]: line["loss"] for line in run.log()}, rel=1e-6)


@pytest.mark.usefixtures("toy")
def test_a_tracker_that_is_chosen_later_gets_all():
    train_toy(duration=512, status=64)
    _, _, run = train_toy(duration=1024, log="tensorboard")
    assert_holds_the_log(run)
    train_toy(duration=1536)
    train_toy(duration=2048, log="tensorboard")
    assert_holds_the_log(run)


@pytest.mark.usefixtures("toy")
def test_a_tracker_that_fails_is_told_once_and_gets_the_rest_when_the_run_is_resumed(monkeypatch, caplog):
    class Full(TensorBoard):
        def scalars(self, step, values, /):
            if step > 256:
                raise OSError(28, "No space left on device")
            super().scalars(step, values)

    with monkeypatch.context() as patch:
        patch.setitem(OPENED, "tensorboard", Full)
        status, _, run = train_toy(duration=512, status=64, log="tensorboard")
    (said,) = caplog.messages
    assert re.fullmatch(
        "tensorboard is left out from here on, got .*No space left.*: training and log.jsonl go on", said
    )
    assert (status, run.log()[-1]["nimg"], max(losses(run)[0])) == (0, 512, 256)
    train_toy(duration=1024, log="tensorboard")
    assert_holds_the_log(run)


@pytest.mark.usefixtures("toy")
def test_a_record_that_cannot_be_opened_does_not_keep_a_run_from_training(caplog):
    Path("run").mkdir()
    Path("run/tensorboard").write_text("a file in its place", encoding="utf-8")
    status, _, run = train_toy(duration=128, log="tensorboard")
    assert (status, run.log()[-1]["nimg"], len(caplog.messages)) == (0, 128, 1)


@pytest.mark.usefixtures("toy")
def test_only_the_first_of_several_processes_logs(tmp_path):
    known = {"duration": 128, "preset": "toy", "data": "digits", "log": "tensorboard", "no_picture": True}
    options = [train_options(outdir=f"run{rank}", **known) for rank in range(2)]

    def work(team):
        return run_training(
            options[team.rank], lambda *given: ToyTrainer(*given, team=team), ToySampler(), prog=PROG, team=team
        )

    assert together(work, 2) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["run0"]
    assert_holds_the_log(Run("run0"))


@pytest.mark.usefixtures("toy")
def test_a_damaged_record_of_what_was_sent_is_refused():
    train_toy(duration=128, log="tensorboard")
    Path("run/trackers.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"trackers\.json must be as it was written"):
        train_toy(duration=256, log="tensorboard")


@pytest.mark.parametrize("words", [{}, {"dry_run": True}])
def test_a_tracker_that_is_not_installed_is_said_before_anything_else(toy, monkeypatch, words):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^--log wandb needs wandb, which is not installed: pip .*edm2\[trackers\]'$"):
        train_toy(log=("tensorboard", "wandb"), **words)
    assert not list(toy.iterdir())


def test_a_folder_of_its_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "neptune").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="neptune, which is not installed"):
        check_installed(["neptune"])


@pytest.mark.usefixtures("toy")
def test_an_unknown_tracker_is_refused_by_name():
    with pytest.raises(InputError, match=r"--log must be one or more of tensorboard, wandb, .* got 'neptune'"):
        train_toy(log="neptune")


@pytest.mark.usefixtures("toy")
def test_a_training_from_python_logs_too():
    dataset = open_dataset("digits")
    config = configure(dataset, preset_name="toy", duration=512, status=64)
    run = train(config, dataset, ToyTrainer, ToySampler(), outdir="run", log=["tensorboard"], prog=PROG)
    assert_holds_the_log(run)
    with pytest.raises(InputError, match="--log nope needs nope"):
        train(config, dataset, ToyTrainer, ToySampler(), outdir="other", log=["nope"], prog=PROG)
