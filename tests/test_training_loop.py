"""The training loop: when log, averages and states are written, and that stopping anywhere changes nothing."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from toy_port import PRESET, PROG, Killed, ToySampler, ToyTrainer, contents, together
from toy_port import train_toy as train

from backends.pipeline.checkpoints.snapshots import load_snapshot, save_snapshot
from backends.pipeline.checkpoints.states import load_state, read_counters
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import storing
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.resolve import configure
from backends.pipeline.runs.team import Team
from backends.pipeline.runs.training import train as run_api
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize
from edm2_core.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("toy")


def stopping(at, signum=signal.SIGTERM):
    """A trainer to which a signal comes during the step that begins at ``at`` images."""

    class Stopping(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == at:
                os.kill(os.getpid(), signum)
            super().step(*args, lr=lr)

    return Stopping


def stored(run):
    return [(source.time, source.length.value) for source in run.snapshots(PRESET.network)]


def test_each_step_gets_its_time_its_batch_and_its_learning_rate():
    _, trainer, _ = train()
    assert trainer.seen == [(nimg, (64, 1, 8, 8), (64, 10)) for nimg in range(0, 4096, 64)]
    assert trainer.rates == [
        learning_rate(nimg, batch=64, ref_lr=PRESET.hyper.lr, ref_batches=20, rampup_nimg=512)
        for nimg in range(0, 4096, 64)
    ]


def test_averages_are_stored_when_a_multiple_of_the_interval_is_crossed_and_at_the_end():
    _, _, run = train(duration=5000, snapshot=1500)
    times = [1536, 3008, 4544, 5056]
    assert stored(run) == [(t, s) for t in times for s in (0.05, 0.10)]


def test_stored_averages_are_the_trainer_s():
    for dtype in (np.float16, np.float32):
        _, trainer, run = train(outdir=dtype.__name__, snapshot_dtype=dtype.__name__)
        for source in run.snapshots(PRESET.network)[-2:]:
            params, constants = source.load().params, source.metadata.kept
            for name, array in trainer.kept[source.length].items():
                stored = array.astype(dtype) if array.ndim and name not in constants else array
                assert np.array_equal(params[name], stored)


def test_epochs_are_said_and_far_too_many_are_noted(capsys):
    train(duration=64, dry_run=True)
    assert "epochs   0.0" in capsys.readouterr().out
    train(duration="1Gi", dry_run=True)
    out = capsys.readouterr().out
    assert "epochs   597,519" in out
    assert "note     597,519 epochs are far more than any data needs: choose a shorter --duration" in out


def test_the_log_has_a_line_per_status_and_one_at_the_end():
    _, _, run = train(duration=2000, status=512)
    log = run.log()
    assert [record["nimg"] for record in log] == [512, 1024, 1536, 2048]
    assert all(list(r) == ["nimg", "loss", "lr", "images_per_s", "seconds", "nonfinite"] for r in log)
    assert all(earlier["seconds"] <= later["seconds"] for earlier, later in pairwise(log))


def test_the_state_is_stored_at_its_interval():
    times = []

    class Watching(ToyTrainer):
        def state(self, names=None):
            times.append(self.nimg)
            return super().state(names)

    train(trainer=Watching, duration=4000, checkpoint=1000)
    assert times == [1024, 2048, 3008, 4032]


def test_the_state_is_stored_with_a_line_of_the_log_once_it_is_old(monkeypatch):
    monkeypatch.setattr(storing, "_OLD", 0.0)
    monkeypatch.setattr(storing, "_WORTH", 0)
    _, _, run = train(duration=512, status=128, checkpoint=10_000, keep=9)
    assert [int(path.name) for path in sorted(run.states_path.iterdir())] == [128, 256, 384, 512]


def test_a_loss_that_is_not_finite_leaves_the_log_valid_json():
    class Diverging(ToyTrainer):
        def metrics(self):
            return {"loss": float("nan"), "nonfinite": 3}

    _, _, run = train(trainer=Diverging, duration=64)
    (line,) = run.log_path.read_text().splitlines()
    record = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert (record["loss"], record["nonfinite"]) == (None, 3)


def test_without_labels_the_steps_get_none():
    _, trainer, run = train(unconditional=True, duration=128)
    assert trainer.seen[0] == (0, (64, 1, 8, 8), None)
    assert run.config().network.label_dim == 0


@pytest.mark.parametrize("k", [64, 1024, 1472, 2048, 4032])
def test_training_in_two_parts_is_training_in_one(k):
    _, _, whole = train("whole")
    train("parts", duration=k, checkpoint=1024, status=64)
    status, trainer, parts = train("parts", duration=4096, checkpoint=1024, status=85)
    assert (status, trainer.resumed) == (0, True)
    assert trainer.seen[0][0] == k
    one, two = contents(whole), contents(parts)
    extra = {f"snapshots/{k // 1000:07d}-{s}.safetensors" for s in ("0.050", "0.100")}  # at the end of the first part
    assert {n: b for n, b in two[1].items() if n not in extra} == {n: b for n, b in one[1].items() if n not in extra}
    assert load_state(whole.state_path, PRESET.network, (Length.of(0.05), Length.of(0.10))).steps == 64


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [0, 1344, 2048])
def test_a_signal_finishes_the_step_stores_the_state_and_says_how_to_go_on(signum, status, at, capsys):
    ended, _, run = train(trainer=stopping(at, signum))
    assert ended == status
    assert read_counters(run.state_path) == (at + 64, at // 64 + 1)
    assert run.log()[-1]["nimg"] == at + 64
    out = capsys.readouterr().out
    assert f"state saved in {run.state_path}; to resume: {PROG} --outdir run" in out
    assert not (run.path / "samples").exists()


def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not():
    _, _, whole = train("whole", status=64)
    train("parts", status=64, trainer=stopping(1344))
    train("parts", trainer=stopping(3008))
    train("parts")
    assert contents(whole) == contents(Run("parts"))


def test_a_killed_run_goes_on_from_its_last_state_and_its_log_has_no_line_twice():
    class Killing(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == 2560:
                raise Killed
            super().step(*args, lr=lr)

    _, _, whole = train("whole", status=64, checkpoint=1024)
    with pytest.raises(Killed):
        train("parts", status=64, checkpoint=1024, trainer=Killing)
    run = Run("parts")
    with open(run.log_path, "a", encoding="utf-8") as file:
        file.write('{"nimg": 26')  # the line that was being written
    assert (run.state_nimg(), run.log()[-1]["nimg"]) == (2048, 2560)
    _, trainer, _ = train("parts")
    assert trainer.seen[0][0] == 2048
    assert contents(whole) == contents(run)


def test_a_run_killed_before_its_first_state_starts_again(capsys):
    class Killing(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == 512:
                raise Killed
            super().step(*args, lr=lr)

    with pytest.raises(Killed):
        train(status=64, trainer=Killing)
    _, trainer, run = train()
    assert (trainer.seen[0][0], trainer.resumed) == (0, False)
    assert [record["nimg"] for record in run.log()] == list(range(64, 4097, 64))
    assert "at 0 images, because no state was stored yet" in capsys.readouterr().out


def test_a_run_whose_state_was_lost_does_not_silently_start_again():
    _, _, run = train()
    shutil.rmtree(run.states_path)
    with pytest.raises(InputError, match=r"its state to be resumed after 4096 images, got none in .*--outdir$"):
        train()


def test_resuming_says_from_where_and_at_how_many_images(capsys):
    train(duration=1024)
    capsys.readouterr()
    train(duration=2048)
    assert "resumed  run/state/000000001024 at 1024 images" in capsys.readouterr().out


def test_a_complete_run_says_so_and_changes_nothing(capsys):
    _, _, run = train()
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    capsys.readouterr()
    status, trainer, _ = train()
    assert (status, trainer) == (0, None)
    out = capsys.readouterr().out
    assert "complete run at 4096 images" in out
    assert "--duration" in out
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}


def test_a_complete_run_without_its_picture_gets_it():
    _, _, run = train()
    picture = run.path / "samples/lengths.png"
    drawn = picture.read_bytes()
    picture.unlink()
    train()
    assert picture.read_bytes() == drawn


def rows(sampler):
    """The calls that drew rows of the picture; the others measured the denoising error."""
    return [call for call in sampler.calls if "sigmas" not in call]


def test_the_picture_has_no_averages_from_after_the_state():
    _, _, run = train(duration=1024)
    early = run.snapshots(PRESET.network)[0]
    late = replace(load_snapshot(early.path), nimg=9999, params=initialize(PRESET.network, seed=5))
    save_snapshot(run.snapshots_path / "late.safetensors", late)
    (run.path / "samples/lengths.png").unlink()
    sampler = ToySampler()
    train(sampler=sampler)
    kept = rows(sampler)[2]["mean"]  # after the raw weights and 0.02
    assert kept == float(np.mean(load_snapshot(early.path).params["unet.out_conv.weight"]))


def test_other_options_for_a_run_that_exists_are_refused_and_change_nothing():
    _, _, run = train(duration=128)
    before = run.config_path.read_bytes()
    with pytest.raises(InputError, match=r"--lr must stay .* got 0.5: .*--outdir"):
        train(lr=0.5)
    assert run.config_path.read_bytes() == before


def test_a_dry_run_prints_the_settings_and_writes_nothing(tmp_path, capsys):
    status, trainer, _ = train(dry_run=True, batch=32)
    out = capsys.readouterr().out
    assert (status, trainer) == (0, None)
    assert '"batch": 32' in out
    assert out.endswith("would train from 0 to 4096 images in run\n")
    assert not list(tmp_path.iterdir())


def test_a_fresh_run_gets_the_next_number():
    train(outdir=None, duration=64)
    train(outdir=None, duration=64)
    assert sorted(p.name for p in Run("runs").path.iterdir()) == ["00000-digits", "00001-digits"]


def test_the_header_and_the_end_say_what_and_what_next(capsys):
    _, _, _ = train(duration=1024)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:4]] == ["device", "network", "data", "run"]
    assert "numpy" in out[0]
    assert "GFLOP" in out[1]
    assert "digits: 1797 images of 8x8x1, 10 classes" in out[2]
    assert "run: 1Ki images in batches of 64" in out[3]
    assert "  python -m backends.toy.sample --run run --sigma-rel 0.15" in out
    assert "  python -m backends.toy.sample --run run --class 3" in out
    assert f"  {PROG} --outdir run --duration 2Ki" in out


def test_dropped_labels_reach_the_step_and_every_snapshot_says_so(capsys):
    _, trainer, run = train(duration=1024, label_dropout=0.5)
    assert {source.config.label_dropout for source in run.snapshots(run.config().network)} == {0.5}
    assert "  python -m backends.toy.sample --run run --class 3 --guidance 2" in capsys.readouterr().out.splitlines()
    assert 400 < trainer.dropped < 624
    with pytest.raises(InputError, match=r"--label-dropout must stay 0\.5 when a run is resumed, got 0\.1"):
        train(duration=2048, label_dropout=0.1)
    with pytest.raises(InputError, match=r"label_dropout must be 0 for a network without labels, got 0\.1"):
        train(outdir="other", label_dropout=0.1, unconditional=True)


def test_the_picture_has_a_row_for_each_length_from_the_same_seeds():
    sampler = ToySampler()
    _, trainer, run = train(sampler=sampler, sigma_rels=(0.03, 0.10))
    calls = rows(sampler)
    assert len(calls) == 7  # raw, 0.02, 0.03 stored, 0.05, 0.10 stored, 0.15, 0.20
    assert all(np.array_equal(call["labels"], np.eye(10, dtype=np.float32)) for call in calls)
    means = [float(np.mean(trainer.params["unet.out_conv.weight"]))]
    means += [
        float(np.mean(load_snapshot(run.snapshots(PRESET.network)[i].path).params["unet.out_conv.weight"]))
        for i in (-2, -1)
    ]
    assert [calls[i]["mean"] for i in (0, 2, 4)] == means
    with Image.open(run.path / "samples/lengths.png") as picture:
        assert picture.height > 7 * 48


def test_a_run_opens_each_snapshot_once_for_its_picture_and_none_while_it_trains(headers_read):
    _, _, run = train(duration=4096, snapshot=1024)
    opened = sorted(path for path in headers_read if path.parent == run.snapshots_path)
    assert opened == sorted(run.snapshots_path.iterdir())


def test_a_process_of_several_gets_its_part_and_only_the_first_writes(tmp_path):
    dataset, opened = open_dataset("digits"), {}
    config = configure(dataset, preset_name="toy", duration=128)

    def work(team):
        def open_trainer(config, machine):
            return opened.setdefault(team.rank, ToyTrainer(config, machine, team=team))

        return run_api(config, dataset, open_trainer, ToySampler(), outdir=f"run{team.rank}", prog=PROG)

    first, *others = together(work, 4)
    assert others == [None] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["run0"]
    assert stored(first) == [(128, 0.05), (128, 0.1)]
    for trainer in opened.values():
        assert trainer.seen == [(0, (16, 1, 8, 8), (16, 10)), (64, (16, 1, 8, 8), (16, 10))]


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="divisible by the number of devices, got 64 for 3"):
        train(trainer=lambda config, machine: ToyTrainer(config, machine, team=Team(0, 3)))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stops_the_run_and_it_can_go_on(monkeypatch):
    _, _, whole = train("whole", checkpoint=1024)

    def full(_):
        raise OSError(28, "No space left on device")

    class Full(ToyTrainer):
        def step(self, *args, lr):
            super().step(*args, lr=lr)
            if self.nimg == 3072:
                monkeypatch.setattr("os.fsync", full)

    with pytest.raises(InputError, match="No space left on device"):
        train("parts", checkpoint=1024, trainer=Full)
    assert not [p for p in Run("parts").path.rglob("*") if p.suffix == ".tmp"]
    monkeypatch.setattr("os.fsync", lambda _: None)
    train("parts")
    assert contents(whole) == contents(Run("parts"))
