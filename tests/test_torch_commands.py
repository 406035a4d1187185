"""The PyTorch commands as a person runs them: the digits, resuming, sampling, several processes, and bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from runpy import run_module

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC

from backends.pipeline.checkpoints.snapshots import load_snapshot
from backends.pipeline.checkpoints.states import load_state, parts
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs import exit_codes
from backends.pipeline.runs.folder import Run
from backends.torch.device import Processes
from edm2_core.presets import preset

TRAIN, SAMPLE = ("-m", "backends.torch.train"), ("-m", "backends.torch.sample")
NONE = "--no-picture"
TWENTY = ("--duration", 1280, "--dropout", 0.1, "--label-dropout", 0.1)
SMALL = ("--duration", "384", "--batch", "64", "--snapshot", "1000", "--status", "128", "--checkpoint", "1Ki", NONE)


def run(*args: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run_here(*args: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """``-m module`` and its arguments in this process, which has PyTorch already: that takes seconds to import."""
    _, module, *argv = map(str, args)
    out, err = StringIO(), StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        got = import_module(module).main(argv)
    assert got == status, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(args, got, out.getvalue(), err.getvalue())


def samples(cwd: Path, *args: object) -> dict[str, np.ndarray]:
    run_here(*SAMPLE, *args, "--format", "npz", "--outdir", "out", cwd=cwd)
    with np.load(cwd / "out" / "samples.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the train command was run with no argument."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "printed.txt").write_text(run(*TRAIN, cwd=folder).stdout)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, as far as it goes without stopping."""
    folder = tmp_path_factory.mktemp("short")
    run_here(*TRAIN, *SMALL, "--outdir", "whole", cwd=folder)
    return folder


@pytest.mark.parametrize("sigma_rel", [0.10, 0.13], ids=["stored", "reconstructed"])
def test_digits_are_read_as_their_labels(digits: Path, sigma_rel: float) -> None:
    data = open_dataset("digits")
    everything = np.arange(len(data))
    reader = SVC(gamma=0.001).fit(data.read(everything).reshape(len(data), -1) * (16 / 255), data.labels(everything))
    made = samples(digits, "--sigma-rel", sigma_rel, "--seeds", "0-299", "--batch", 100)
    read = reader.predict(made["images"].reshape(300, -1) * (16 / 255))
    assert (read == made["labels"]).mean() >= 0.96


def test_a_run_leaves_what_it_promises(digits: Path) -> None:
    folder = digits / "runs" / "00000-digits"
    duration = preset("digits").hyper.duration
    names = {path.name for path in folder.iterdir()} - {".writer.lock"}
    assert names == {"config.json", "log.jsonl", "telemetry.jsonl", "snapshots", "state", "samples"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["nimg"] >= duration
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    with Image.open(folder / "samples" / "lengths.png") as picture:
        assert picture.width > 300
    printed = (digits / "printed.txt").read_text()
    assert "lengths.png" in printed
    assert "python -m backends.torch.sample --run" in printed


def test_sampling_with_no_argument_takes_the_newest_run(digits: Path) -> None:
    printed = run_here(*SAMPLE, "--seeds", "0-3", cwd=digits).stdout
    (grid,) = (digits / "runs" / "00000-digits" / "samples").glob("*/grid.png")
    assert str(grid.relative_to(digits)) in printed
    with Image.open(grid) as picture:
        assert picture.mode == "L" or picture.mode == "RGB"


def test_a_seed_is_an_image_whatever_the_batch(short: Path) -> None:
    one, other = (samples(short, "--run", "whole", "--seeds", "0-9", "--steps", 8, "--batch", n) for n in (3, 10))
    assert np.abs(one["images"].astype(int) - other["images"]).max() <= 1  # the last bit may round the other way
    assert np.array_equal(one["labels"], other["labels"])


def test_guidance_by_an_earlier_self_and_by_the_unlabelled_self(digits: Path, short: Path) -> None:
    guide = min((digits / "runs" / "00000-digits" / "snapshots").glob("*-0.050.safetensors"))
    enough = ("--duration", "4Ki", "--no-picture")  # to tell classes apart
    run_here(*TRAIN, *SMALL, *enough, "--label-dropout", 0.1, "--outdir", "dropped", cwd=short)
    options = ("--seeds", "0-4", "--steps", 6, "--class", 7)
    for folder, run, guided in ((digits, (), ("--guide", guide)), (short, ("--run", "dropped"), ())):
        plain = samples(folder, *run, *options)
        assert not np.array_equal(samples(folder, *run, *options, "--guidance", 2, *guided)["images"], plain["images"])
        assert set(plain["labels"]) == {7}


def test_stopping_by_a_signal_and_resuming_is_not_stopping(short: Path) -> None:
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        outdir = short / signum.name
        process = subprocess.Popen([sys.executable, *TRAIN, *SMALL, "--outdir", str(outdir)], stderr=subprocess.PIPE)
        while not (outdir / "log.jsonl").exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signum)
        process.communicate()
        assert process.returncode == status
        assert load_state_of(outdir).nimg < 384
        assert "resumed" in run_here(*TRAIN, "--outdir", outdir, NONE, cwd=short).stdout
        assert state_bytes(outdir) == state_bytes(short / "whole")


def test_a_finished_run_goes_on_when_prolonged(short: Path) -> None:
    run_here(*TRAIN, *SMALL, "--duration", "192", "--outdir", "prolonged", cwd=short)
    assert "complete" in run_here(*TRAIN, "--outdir", "prolonged", NONE, cwd=short).stdout
    run_here(*TRAIN, "--outdir", "prolonged", "--duration", "384", NONE, cwd=short)
    assert state_bytes(short / "prolonged") == state_bytes(short / "whole")


@pytest.fixture(scope="module")
def twenty(short: Path) -> Path:
    """Twenty steps of one process, dropout included."""
    run_here(*TRAIN, *SMALL, *TWENTY, "--outdir", "twenty", cwd=short)
    return short / "twenty"


def test_processes_that_have_met_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """See :func:`backends.pipeline.runs.exit_codes.end_at_once`."""
    monkeypatch.setattr(exit_codes, "_at_once", False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    Processes(rank=0, world=2).join(torch.device("cpu"))
    assert exit_codes._at_once


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("backends.torch.train", ["--data", "nowhere"]),
        ("backends.torch.sample", ["--run", "nowhere"]),
        ("backends.commands.cli", ["evaluate", "--net", "nowhere"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_what_torchrun_starts_leaves_by_its_status(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(exit_codes, "leave", left.append)
    monkeypatch.setattr(sys, "argv", [module, *words])
    run_module(module, run_name="__main__")
    assert left == [2]


@pytest.mark.parametrize(
    ("count", "options"),
    [(2, ()), (2, ("--shard",)), (4, ("--shard", "--batch-per-device", 8))],
    ids=["two", "two, divided", "four, divided, in parts"],
)
def test_processes_train_what_one_does(short: Path, twenty: Path, count: int, options: tuple[object, ...]) -> None:
    """Losses and weights, to the rounding of sums in another order, which Adam carries on; moments as they scale."""
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=29517")
    name = f"{count}-{len(options)}"
    run(*torchrun, *TRAIN, *SMALL, *TWENTY, *options, "--outdir", name, "--device", "cpu", cwd=short)
    assert len(list(Run(short / name).state_path.glob("*.safetensors"))) == count
    one, other = load_state_of(twenty), load_state_of(short / name)
    assert (other.nimg, other.steps) == (one.nimg, one.steps)
    losses = [[line["loss"] for line in Run(folder).log()] for folder in (twenty, short / name)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for part, arrays in parts(one).items():
        for array_name, array in arrays.items():
            moved = np.linalg.norm(parts(other)[part][array_name] - array)
            assert moved <= 1e-3 * max(np.linalg.norm(array), 1e-3), (part, array_name)


def test_a_process_without_the_run_resumes_with_the_first(short: Path) -> None:
    """As on two hosts without a common disk: the second finds neither folder nor state."""
    shutil.copytree(short / "whole", short / "here" / "run")
    (short / "there").mkdir()
    words = (*TRAIN, "--duration", "512", "--outdir", "run", "--device", "cpu", "--no-picture")
    pair = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    commands = [
        subprocess.Popen(
            [sys.executable, *words], cwd=short / cwd, env={**os.environ, **pair, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, cwd in enumerate(("here", "there"))
    ]  # fmt: skip
    printed = [command.communicate(timeout=120)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0], printed
    assert "sent     the state to process 1" in printed[0]
    assert not list((short / "there").iterdir())
    shutil.copytree(short / "whole", short / "alone")
    run_here(*TRAIN, "--duration", "512", "--outdir", "alone", "--no-picture", cwd=short)
    one, two = load_state_of(short / "alone"), load_state_of(short / "here" / "run")
    assert (two.nimg, two.steps) == (one.nimg, one.steps)
    for name, weight in one.params.items():
        assert np.linalg.norm(two.params[name] - weight) <= 1e-3 * max(np.linalg.norm(weight), 1e-3), name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains(short: Path, precision: str) -> None:
    run_here(*TRAIN, *SMALL, "--precision", precision, "--batch-per-device", 32, "--outdir", precision, cwd=short)
    last = [json.loads((short / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("whole", precision)]
    assert last[1]["loss"] == pytest.approx(last[0]["loss"], rel=0.05)
    assert last[1]["nonfinite"] == 0


def load_state_of(folder: Path):
    snapshot = next((folder / "snapshots").glob("*.safetensors"), None)
    config = load_snapshot(snapshot).required_config() if snapshot else preset("digits").network
    return load_state(Run(folder).state_path, config, (0.05, 0.10))


def state_bytes(folder: Path) -> bytes:
    (shard,) = Run(folder).state_path.glob("*.safetensors")
    return shard.read_bytes()


def mixed_sizes(folder: Path) -> None:
    (folder / "images").mkdir()
    for name, size in (("a.png", 8), ("b.png", 16)):
        Image.new("L", (size, size)).save(folder / "images" / name)


def no_labels(folder: Path) -> None:
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "images" / "a.png")


def odd_images(folder: Path) -> None:
    (folder / "images").mkdir()
    Image.new("L", (9, 9)).save(folder / "images" / "a.png")


def torn_snapshot(folder: Path) -> None:
    (folder / "torn.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "command", "says"),
    [
        (nothing, (*TRAIN, "--preset", "huge"), "preset must be one of digits, img512-xxs.*got 'huge'"),
        (nothing, (*TRAIN, "--batch", 100, "--batch-per-device", 64), "--batch must be divisible.*100 and 64"),
        (nothing, (*TRAIN, "--sigma-rels", 0.05, 0.3), r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
        (nothing, (*TRAIN, "--duration", "soon"), "--duration must be.*got 'soon'"),
        (nothing, (*TRAIN, "--device", "abacus"), "--device must be one that is here.*got abacus"),
        (nothing, (*TRAIN, "--data", "nowhere"), "nowhere"),
        (
            odd_images,
            (*TRAIN, "--data", "images", "--preset", "digits"),
            "img_resolution must be divisible by 2.*got 9",
        ),
        (
            no_labels,
            (*TRAIN, "--data", "images", "--preset", "img64-xs"),
            "must have data with labels.*--unconditional",
        ),
        (mixed_sizes, (*TRAIN, "--data", "images"), r"1 of 2 that are not: images/b.png is 16x16"),
        (nothing, (*SAMPLE, "--sigma-rel", "0.1"), "--sigma-rel needs a run.*train one"),
        (nothing, (*SAMPLE, "--net", "absent.safetensors"), "absent.safetensors"),
        (torn_snapshot, (*SAMPLE, "--net", "torn.safetensors"), "torn.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, prepare, command, says: str) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = run_here(*command, cwd=tmp_path, status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(says, done.stderr), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_to_a_run_is_one_line(short: Path) -> None:
    for options, says in (
        (("--outdir", "whole", "--lr", 0.5), "--lr must stay"),
        (("--outdir", "whole", "--preset", "img64-s"), "--preset must stay"),
    ):
        assert says in run_here(*TRAIN, *options, cwd=short, status=2).stderr
    for options, says in (
        (("--run", "whole", "--sigma-rel", 0.4), "within (0, 0.2887)"),
        (("--run", "whole", "--class", 10), "--class must be from 0 to 9"),
        (("--run", "whole", "--seeds", "3-1"), "seeds"),
        (("--run", "whole", "--guide", "x"), "--guidance"),
    ):
        assert says in run_here(*SAMPLE, *options, cwd=short, status=2).stderr


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk"
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]).returncode:
        pytest.skip("no right to mount")
    try:
        done = run(*TRAIN, *SMALL, "--outdir", tmp_path / "run", cwd=tmp_path.parent, status=2)
        assert "room" in done.stderr or "space" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert not [path for path in kept if "tmp" in path.name]
        for path in kept:
            if path.parent.name == "snapshots":
                load_snapshot(path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    printed = run_here(*TRAIN, "--dry-run", cwd=tmp_path).stdout
    assert '"preset": "digits"' in printed
    assert not list(tmp_path.iterdir())


def test_our_torch_folder_does_not_shadow_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import torch\n\ndef test_it():\n    torch.ones(1)\n")
    root = Path(__file__).resolve().parent.parent
    run("-c", "import torch; torch.ones(1)", cwd=root / "backends" / "torch")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, "--rootdir", root, cwd=root)
