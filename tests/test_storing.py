"""States in shards: each process stores its share while training goes on; before all are there, there is no state."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from toy_port import CONFIG, PRESET, PROG, ToySampler, ToyTrainer, contents, together
from toy_port import train_toy as train

from backends.pipeline.checkpoints import states
from backends.pipeline.checkpoints.states import INDEX, arrays_of, load_state, read_counters, shard_of
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import storing, training
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.progress import Progress
from backends.pipeline.runs.resolve import configure
from backends.pipeline.runs.storing import shares
from backends.pipeline.runs.training import train as run_api
from edm2_core.errors import InputError
from edm2_core.network import plan
from edm2_core.presets import preset

pytestmark = pytest.mark.usefixtures("toy")
LENGTHS = PRESET.hyper.lengths


def train_together(count, trainer=ToyTrainer, outdir="run", **options):
    """What the API returns or raises in each of ``count`` processes, and the trainers."""
    dataset, opened = open_dataset("digits"), {}
    config = configure(dataset, preset_name="toy", **{"duration": 256, "checkpoint": 128} | options)

    def work(team):
        def open_trainer(config, machine):
            return opened.setdefault(team.rank, trainer(config, machine, team=team))

        return run_api(config, dataset, open_trainer, ToySampler(), outdir=outdir, picture=False, prog=PROG)

    return together(work, count), [opened[rank] for rank in sorted(opened)]


def same(one, two):
    ours, theirs = arrays_of(one), arrays_of(two)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_process_stores_its_share_and_together_they_are_the_state(count):
    _, trainers = train_together(count)
    path = Run("run").state_path
    assert path.name == "000000000256"
    assert sorted(p.name for p in path.glob("*.safetensors")) == [shard_of(path, i, count).name for i in range(count)]
    assert read_counters(path) == (256, 4)
    assert same(load_state(path, CONFIG, LENGTHS), trainers[0].state())
    index = json.loads((path / INDEX).read_text())
    assert index["weight_map"].keys() == arrays_of(trainers[0].state()).keys()
    assert index["metadata"]["total_size"] == sum(4 * array.size for array in arrays_of(trainers[0].state()).values())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1)])
def test_a_run_goes_on_with_another_number_of_processes(before, after):
    train_together(before)
    _, trainers = train_together(after, duration=512)
    assert all(trainer.seen[0][0] == 256 for trainer in trainers)
    train_together(1, outdir="whole", duration=512)
    theirs = load_state(Run("whole").state_path, CONFIG, LENGTHS).params
    for name, array in load_state(Run("run").state_path, CONFIG, LENGTHS).params.items():
        assert np.allclose(array, theirs[name], rtol=1e-4, atol=1e-5), name  # the batch is summed in another order


def test_processes_that_do_not_see_the_folder_leave_their_share_to_those_that_do(monkeypatch):
    blind, see = set(), storing.holder

    class OnHosts(ToyTrainer):
        def __init__(self, *args, team):
            super().__init__(*args, team=team)
            if team.rank in (1, 3):
                blind.add(threading.get_ident())

    monkeypatch.setattr(storing, "holder", lambda path: b"" if threading.get_ident() in blind else see(path))
    _, trainers = train_together(4, trainer=OnHosts)
    path = Run("run").state_path
    assert sorted(p.name for p in path.glob("*.safetensors")) == [shard_of(path, i, 2).name for i in range(2)]
    assert same(load_state(path, CONFIG, LENGTHS), trainers[0].state())


def test_shares_are_about_equal_and_hold_each_parameter_once():
    network = preset("img512-s").network
    sizes = {name: int(np.prod(parameter.shape)) for name, parameter in plan(network).parameters.items()}
    for count in (1, 2, 8, 32):
        divided = shares(network, count)
        assert sorted(name for names in divided for name in names) == sorted(sizes)
        loads = [sum(sizes[name] for name in names) for names in divided]
        # a share is at most the mean and one parameter more: the lightest gets the next
        assert max(loads) <= sum(sizes.values()) / count + max(sizes.values())


def test_the_last_states_are_kept():
    _, _, run = train(duration=1024, checkpoint=128, keep=3)
    assert [int(path.name) for path in sorted(run.states_path.iterdir())] == [768, 896, 1024]
    train(duration=1280, keep=1)
    assert [int(path.name) for path in run.states_path.iterdir()] == [1280]


def test_training_goes_on_while_a_state_is_written_and_what_it_holds_is_that_of_its_time(monkeypatch):
    _, _, whole = train("whole", duration=512, checkpoint=512, keep=9)
    save, may_end, seen = states.save_state, threading.Event(), []

    def slow(path, state):
        assert may_end.wait(20)
        save(path, state)

    class Watching(ToyTrainer):
        def step(self, *args, lr):
            super().step(*args, lr=lr)
            seen.append(Run("run").state_path)
            if self.nimg == 896:
                may_end.set()

    monkeypatch.setattr(states, "save_state", slow)
    train(trainer=Watching, duration=1024, checkpoint=512, keep=9)
    assert seen[:14] == [None] * 14  # 512 images are stored in the background, of 8 steps, for 6 more
    first = load_state(states.folder_of(Run("run").states_path, 512), CONFIG, LENGTHS)
    assert same(first, load_state(whole.state_path, CONFIG, LENGTHS))


def test_a_state_without_its_index_is_none_and_the_one_before_is_taken():
    train(duration=512, checkpoint=256, keep=2)
    run = Run("run")
    (run.state_path / INDEX).unlink()
    assert run.state_nimg() == 256
    _, trainer, _ = train(duration=512)
    assert trainer.seen[0][0] == 256
    _, _, whole = train("whole", duration=512)
    assert same(load_state(run.state_path, CONFIG, LENGTHS), load_state(whole.state_path, CONFIG, LENGTHS))


def test_what_stopped_writers_left_is_removed():
    train(duration=256)
    half = Run("run").states_path / "000000000999"
    half.mkdir()
    (half / ".state-00001-of-00002.safetensors.5.tmp").write_bytes(b"half")
    train(duration=320)
    assert [path.name for path in Run("run").states_path.iterdir()] == ["000000000320"]


def test_the_state_of_an_earlier_version_is_resumed_and_replaced():
    _, trainer, run = train(duration=256)
    shutil.rmtree(run.states_path)
    single = run.states_path / "state.safetensors"
    states.save_state(single, trainer.state())
    assert run.state_path == single
    _, resumed, _ = train(duration=512)
    assert resumed.seen[0][0] == 256
    assert [path.name for path in run.states_path.iterdir()] == ["000000000512"]


def test_every_byte_of_an_index_counts_or_changes_nothing():
    _, trainer, run = train(duration=64)
    index = run.state_path / INDEX
    whole, state = index.read_bytes(), trainer.state()
    for at in range(0, len(whole), 7):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        said = outcome(run.state_path, state)
        assert said == "the same" or str(index) in said, (at, said)
        index.write_bytes(whole[:at])
        with pytest.raises(InputError, match=INDEX):
            load_state(run.state_path, CONFIG, LENGTHS)


def outcome(path, state):
    try:
        return "the same" if same(load_state(path, CONFIG, LENGTHS), state) else "another"
    except InputError as error:
        return str(error)


def test_a_shard_of_another_state_is_refused():
    train_together(2, keep=2, checkpoint=128)
    one, two = sorted(Run("run").states_path.iterdir())
    shutil.copy(shard_of(one, 1, 2), shard_of(two, 1, 2))
    with pytest.raises(InputError, match=r"state-00002-of-00002.safetensors must be the shard that .* names"):
        load_state(two, CONFIG, LENGTHS)


def test_a_write_that_fails_in_one_process_ends_all_and_keeps_the_state_before(monkeypatch):
    save = states.save_state

    def failing(path, state):
        if state.nimg == 256 and path.name.startswith("state-00002"):
            raise InputError(f"{path} must have room")
        save(path, state)

    monkeypatch.setattr(states, "save_state", failing)
    got, _ = train_together(2)
    assert ["state-00002-of-00002.safetensors must have room" in str(error) for error in got] == [True, True]
    assert Run("run").state_nimg() == 128


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_stores_the_state_of_all(rank, capsys):
    class Failing(ToyTrainer):
        """Cannot decode a batch."""

        def place(self, batch, /):
            if self.rank == rank and self.nimg >= 128:
                raise InputError("image 7 cannot be read")
            return super().place(batch)

    got, trainers = train_together(2, trainer=Failing, duration=4096, checkpoint=4096)
    assert "image 7 cannot be read" in str(got[rank])
    assert "got an error in another" in str(got[1 - rank])
    assert Run("run").state_nimg() == trainers[0].nimg == trainers[1].nimg >= 128
    assert f"saved    the state at {trainers[0].nimg} images" in capsys.readouterr().err


def test_killed_while_its_first_state_is_written_a_run_begins_anew_and_ends_the_same(monkeypatch):
    _, _, whole = train("whole", duration=1024, checkpoint=256)

    def lost(folder, *, count):
        raise KeyError

    class Killed(ToyTrainer):
        def step(self, *args, lr):
            if self.nimg == 448:
                raise ZeroDivisionError
            super().step(*args, lr=lr)

    with monkeypatch.context() as patched:
        patched.setattr(states, "complete", lost)
        with pytest.raises((KeyError, ZeroDivisionError)):
            train(duration=1024, checkpoint=256, trainer=Killed)
    assert Run("run").state_path is None
    _, trainer, run = train()
    assert trainer.seen[0][0] == 0
    assert contents(run) == contents(whole)


def test_counts_of_states_that_cannot_be_kept_are_refused():
    with pytest.raises(InputError, match="keep must be at least 1, got 0"):
        train(keep=0, dry_run=True)
    assert not Path("run").exists()


def test_an_error_where_one_process_alone_writes_stores_the_state_of_all(monkeypatch):
    """The others report the same losses as if nothing had happened: messages stay in step."""
    advance = Progress.advance

    def failing(progress, count):
        if progress._shown and progress._done >= 128:
            raise BrokenPipeError
        advance(progress, count)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "advance", failing)
        with pytest.raises(BrokenPipeError):
            train_together(2, duration=4096, checkpoint=4096, status=64)
    losses = [line["loss"] for line in Run("run").log()]
    train_together(2, duration=256, outdir="whole", status=64)
    assert losses == [line["loss"] for line in Run("whole").log()][: len(losses)]
    assert Run("run").state_nimg() == 64 * len(losses)


def test_an_error_of_a_measurement_stores_the_state_first(monkeypatch):
    def measure(nimg):
        raise InputError(f"no figure at {nimg}")

    monkeypatch.setattr(training, "_scores", lambda *_: measure)
    with pytest.raises(InputError, match="no figure at 4096"):
        train(duration=4096, checkpoint=1 << 20)
    assert Run("run").state_nimg() == 4096


def test_killed_before_the_last_states_are_removed_a_complete_run_removes_them_when_it_is_asked_for():
    train(duration=1024, checkpoint=512)
    run = Run("run")
    shutil.copytree(states.folder_of(run.states_path, 1024), states.folder_of(run.states_path, 512))
    train()
    assert [path.name for path in run.states_path.glob("0*")] == [states.folder_of(run.states_path, 1024).name]
