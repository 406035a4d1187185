"""What a run keeps: one writer, one state for all processes, and that state at every end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_port import PRESET, PROG, Killed, ToySampler, ToyTrainer, contents, together
from toy_port import train_toy as train

from backends.pipeline.checkpoints.states import load_state, read_counters
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import snapshots_due
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.resolve import configure
from backends.pipeline.runs.training import train as run_api
from edm2_core.errors import InputError

pytestmark = pytest.mark.usefixtures("toy")


def test_processes_whose_weights_drift_apart_stop_before_a_state_is_written():
    dataset = open_dataset("digits")
    config = configure(dataset, preset_name="toy", duration=128)

    class Faulty(ToyTrainer):
        def take_step(self, batch, *, lr):
            made = super().take_step(batch, lr=lr)
            self.params["unet.out_gain"] += np.float32(1e-7 * self.rank)
            return made

    def work(team):
        def open_trainer(config, machine):
            return Faulty(config, machine, team=team)

        return run_api(config, dataset, open_trainer, ToySampler(), outdir="run", prog=PROG)

    assert ["got another in process 1 after 64 " in str(error) for error in together(work, 2)] == [True] * 2
    assert Run("run").state_path is None


def test_a_second_writer_is_refused_and_the_first_goes_on():
    said = []

    class Twice(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == 1024:
                with pytest.raises(InputError, match=r"a run must have one writer, got run, which process \d+ on "):
                    train("run")
                said.append(self.nimg)
            super().step(*args, lr=lr)

    _, _, run = train("run", trainer=Twice, checkpoint=512)
    assert said == [1024]
    assert contents(run)[1] == contents(train("alone", checkpoint=512)[2])[1]


@pytest.mark.parametrize("error", [InputError("no room"), BrokenPipeError(), ZeroDivisionError()], ids=repr)
def test_an_error_between_steps_saves_the_state_and_the_run_goes_on_from_there(error, monkeypatch, capsys):
    _, _, whole = train("whole", checkpoint=4096)
    append = Run.append_log

    def failing(run, record):
        if record["nimg"] == 3072:
            raise error
        append(run, record)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "append_log", failing)
        with pytest.raises(type(error)):
            train("parts", checkpoint=4096)
    assert "at 3072 images" in capsys.readouterr().err
    assert read_counters(Run("parts").state_path) == (3072, 48)
    _, trainer, run = train("parts")
    assert trainer.seen[0][0] == 3072
    assert contents(whole)[1:] == contents(run)[1:]  # the log lacks the line


class Failing(ToyTrainer):
    """Its last process cannot take the step at 2560 images."""

    def step(self, *args, lr):
        if self.nimg == 2560 and self.rank == self.world - 1:
            raise ZeroDivisionError
        super().step(*args, lr=lr)


def test_an_error_within_a_step_stores_the_state_before_it(capsys):
    _, _, whole = train("whole", status=64)
    with pytest.raises(ZeroDivisionError):
        train("parts", trainer=Failing, status=64, checkpoint=1024)
    assert read_counters(Run("parts").state_path) == (2560, 40)
    assert "saved    the state at 2560 images" in capsys.readouterr().err
    _, trainer, parts = train("parts")
    assert trainer.seen[0][0] == 2560
    assert contents(parts) == contents(whole)


def test_an_error_that_changed_a_part_of_the_state_keeps_the_one_before():
    class Half(Failing):
        def state_alone(self, error):
            return None

    with pytest.raises(ZeroDivisionError):
        train("parts", trainer=Half, checkpoint=1024)
    assert read_counters(Run("parts").state_path) == (2048, 32)


def test_what_is_left_of_several_processes_stores_the_state(capsys):
    dataset = open_dataset("digits")
    config = configure(dataset, preset_name="toy", checkpoint=1024)

    def work(team):
        return run_api(config, dataset, lambda c, m: Failing(c, m, team=team), ToySampler(), outdir="run", prog=PROG)

    lost, failed = together(work, 2)
    assert isinstance(failed, ZeroDivisionError)
    assert "all processes must stay" in str(lost)
    assert read_counters(Run("run").state_path) == (2560, 40)
    state = load_state(Run("run").state_path, config.network, config.hyper.lengths)
    _, trainer, _ = train("alone", duration=2560)
    assert all(np.array_equal(state.params[name], array) for name, array in trainer.params.items())


def test_a_snapshot_that_could_not_be_written_is_when_the_run_goes_on(monkeypatch):
    _, _, whole = train("whole", status=64, checkpoint=1536)
    save = snapshots_due.save_snapshot

    def failing(path, snapshot, **options):
        if snapshot.nimg == 2048:
            raise InputError("no room")
        save(path, snapshot, **options)

    with monkeypatch.context() as patched:
        patched.setattr(snapshots_due, "save_snapshot", failing)
        with pytest.raises(InputError, match="no room"):
            train("parts", status=64, checkpoint=1536)
    assert Run("parts").state_nimg() == 2048
    _, _, parts = train("parts")
    assert contents(parts)[1:] == contents(whole)[1:]  # the log has no line of 2048 images


def test_weights_that_are_not_finite_do_not_replace_the_state():
    class Diverging(ToyTrainer):
        def take_step(self, batch, *, lr):
            made = super().take_step(batch, lr=lr)
            if self.nimg == 2560:
                self.moments2["unet.out_gain"] = np.float32("nan")
            return made

    with pytest.raises(InputError, match=r"got other numbers in adam2/unet\.out_gain after 3072 images.*smaller --lr"):
        train("run", trainer=Diverging, checkpoint=1024)
    state = load_state(Run("run").state_path, PRESET.network, PRESET.hyper.lengths)
    assert state.nimg == 2048
    assert all(np.isfinite(array).all() for array in state.moments2.values())


@pytest.mark.parametrize(("first", "duration"), [(512, 16384), (0, 1024)], ids=["a hundred in a row", "all of a run"])
def test_gradients_that_are_never_finite_stop_the_run(first, duration):
    class Zeroed(ToyTrainer):
        def take_step(self, batch, *, lr):
            return super().take_step(batch, lr=lr)[0], int(self.nimg > first)

    with pytest.raises(InputError, match=rf"gradients must be finite, got others in all \d+ steps from {first} to \d+"):
        train("run", trainer=Zeroed, duration=duration)


def test_a_loss_far_above_those_before_is_said_and_marked(capsys):
    class Spiking(ToyTrainer):
        def metrics(self):
            noise = np.sin(self.nimg) * 0.01
            return {"loss": 1 + noise + (self.nimg == 2048), "nonfinite": super().metrics()["nonfinite"]}

    _, _, run = train(trainer=Spiking, status=64)
    assert [line["nimg"] for line in run.log() if line.get("spike")] == [2048]
    assert "warning: the loss rose to 1.99" in capsys.readouterr().err


def test_a_run_resumed_at_any_state_logs_the_same_means():
    class Killing(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == 2496:
                raise Killed
            super().step(*args, lr=lr)

    _, _, whole = train("whole", status=1500, checkpoint=700)
    with pytest.raises(Killed):
        train("parts", status=1500, checkpoint=700, trainer=Killing)
    _, trainer, parts = train("parts")
    assert trainer.seen[0][0] == 2112  # between two lines of --status
    assert contents(parts)[0] == contents(whole)[0]


HANGS = """
import sys, threading
from toy_port import PRESET, PRESETS, ToySampler, ToyTrainer, run_toy
from backends.pipeline.runs.exit_codes import command
PRESETS["toy"] = PRESET

class Hanging(ToyTrainer):
    def place(self, batch, /):
        if self.nimg >= 256:
            threading.Event().wait()
        return super().place(batch)

def main():
    return run_toy(Hanging, ToySampler(), preset="toy", data="digits", outdir="run", timeout=2, duration=4096)
sys.exit(command(main)())
"""


def test_data_that_do_not_come_end_the_process_after_its_state_is_stored(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", HANGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: data must be read within 1.6 s, got no batch of digits: ")
    assert Run("run").state_nimg() >= 256


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(InputError, match="must be a number of seconds above 0"):
        train(timeout=limit, dry_run=True)
