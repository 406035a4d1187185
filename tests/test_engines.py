"""States as checkpoints of DCP and orbax, by the real libraries: there and back bit by bit; and from other trainers."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_port import CONFIG, PRESET, train_toy

from backends.commands.cli import main
from backends.pipeline.checkpoints import engines
from backends.pipeline.checkpoints.states import arrays_of, load_state
from backends.pipeline.runs.folder import Run
from backends.torch.step import Learner
from backends.torch.weights import build
from edm2_core.ema import Length
from edm2_core.network import initialize

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("toy"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LENGTHS = PRESET.hyper.lengths


def edm2(*words, status=0):
    assert main(["convert-state", *map(str, words)]) == status


def state_of(name):
    return load_state(Run(name).state_path, CONFIG, LENGTHS)


def same(one, two):
    ours, theirs = arrays_of(one), arrays_of(two)
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize("engine", ["dcp", "orbax"])
def test_there_and_back_is_the_same_run_which_goes_on(engine, capsys):
    train_toy("run", duration=512)
    edm2("run", "there", "--to", engine)
    edm2("there", "back")
    assert "after 512 images and 8 steps" in capsys.readouterr().out
    assert same(state_of("back"), state_of("run"))
    for name in ("run", "back"):
        train_toy(name, duration=1024)
    assert same(state_of("back"), state_of("run"))


def learner():
    return Learner(build(CONFIG, initialize(CONFIG, seed=0)), sigma_rels=LENGTHS)


def test_a_torch_trainer_loads_it_by_its_own_means():
    """get_state_dict, load and set_state_dict, as PyTorch's tutorial has them."""
    train_toy("run", duration=512)
    edm2("run", "there")
    trainer, state = learner(), state_of("run")
    trainer.load_state(state)  # allocates the moments, which are then lost
    with torch.no_grad():
        for moments in trainer.optimizer.state.values():
            moments["exp_avg"].zero_()
    model, optimizer = get_state_dict(trainer.network, trainer.optimizer)
    for group in optimizer.pop("param_groups"):
        assert group
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id="there", no_dist=True)
    for name, parameter in trainer.network.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), state.params[name])
        assert np.array_equal(optimizer["state"][name]["exp_avg"].numpy(), state.moments1[name])
    assert callable(set_state_dict)


def foreign():
    """A checkpoint of a torch trainer that knows nothing of averages, and has things of its own."""
    trainer = learner()
    trainer.load_state(state_of("run"))
    model, optimizer = get_state_dict(trainer.network, trainer.optimizer)
    extra = {"epoch": 3, "losses": torch.ones(2)}
    dcp.save({"model": model, "optimizer": optimizer, **extra}, checkpoint_id="foreign", no_dist=True)


def test_a_checkpoint_of_another_trainer_becomes_the_state_of_a_run(capsys):
    train_toy("run", duration=512)
    foreign()
    edm2("foreign", "run", "--nimg", 1024, status=2)
    assert (
        "must hold ema.0.05.unet.emb_fourier.freqs, got none: save it with the others, or let them begin anew with "
        "--missing-fresh" in capsys.readouterr().err
    )
    edm2("foreign", "run", "--nimg", 1024, "--missing-fresh")
    assert "left out  1 arrays that are no part of a state, such as losses" in capsys.readouterr().out
    state = state_of("run")
    assert (state.nimg, state.steps) == (1024, 8)
    assert np.array_equal(state.averages[Length.of(0.1)]["unet.out_conv.weight"], state.params["unet.out_conv.weight"])
    _, trainer, _ = train_toy("run", duration=1280)
    assert trainer.seen[0][0] == 1024


def test_what_cannot_be_converted_is_one_line(capsys):
    train_toy("run", duration=512)
    foreign()
    edm2("run", "whole")
    Path("file").touch()
    for words, says in (
        (("foreign", "run"), "must say how many images were seen"),
        (("foreign", "run", "--nimg", 512), "must be later than that of the run, after 512 images, got one after 512"),
        (("foreign", "elsewhere", "--nimg", 9), "must become the state of a run, got no run in elsewhere"),
        (("run", "run"), "a checkpoint must become a new folder, got run, which exists"),
        (("run", "file/there"), "file/there must be writable, got 'Not a directory'"),
        (("run", "file/there", "--to", "orbax"), "file/there must be writable, got 'Not a directory'"),
        (("whole", "file/run"), "file/run must be writable, got 'Not a directory'"),
        (("nowhere", "there"), "a run must be a folder with a config.json"),
    ):
        edm2(*words, status=2)
        assert says in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(capsys):
    train_toy("run", duration=512)
    edm2("run", "there")
    for path in (Path("there/.metadata"), Path("there/__0_0.distcp")):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        capsys.readouterr()
        edm2("there", "back", status=2)
        err = capsys.readouterr().err
        assert err.startswith("error: there must be a whole checkpoint of dcp, got ")
        assert "Traceback" not in err
        path.write_bytes(whole)


def test_a_damaged_checkpoint_of_orbax_is_one_line_at_the_end():
    """In a process of its own, in which tasks that orbax leaves behind fail too."""
    train_toy("run", duration=512)
    edm2("run", "there", "--to", "orbax")
    path = max((path for path in Path("there").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:1000])
    command = [sys.executable, "-m", "backends.commands.cli", "convert-state", "there", "back"]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=where, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there must be a whole checkpoint of orbax")
    assert done.stderr.count("\n") == 1


def test_tasks_that_fail_after_an_error_are_unheard_and_other_errors_heard(monkeypatch, capsys):
    """Those that orbax leaves behind when it fails, in other threads, at any time until the process ends."""

    def tell():
        sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)
        sys.excepthook(ValueError, ValueError("ours"), None)
        logging.getLogger("asyncio").error("Task exception was never retrieved")
        return capsys.readouterr().err

    for name in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, f"__{name}__"))
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    with engines._unheard_tasks():
        assert tell() == "ValueError: ours\n"
    assert "Event loop is closed" in tell()  # nothing failed
    with pytest.raises(ZeroDivisionError), engines._unheard_tasks():
        1 / 0  # noqa: B018
    assert tell() == "ValueError: ours\n"


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_an_index_that_would_run_code_is_refused(capsys):
    train_toy("run", duration=512)
    edm2("run", "there")
    Path("there/.metadata").write_bytes(pickle.dumps(Harm()))
    edm2("there", "back", status=2)
    assert "the index of a checkpoint must hold names and shapes" in capsys.readouterr().err
    Path("there/.metadata").write_bytes(b"\x80\x04r\xff\xff\xff\x7f.")
    edm2("there", "back", status=2)
    assert not Path("harmed").exists()
