"""Files that others made, damaged in ways that no one chose: a reader returns, or raises our own error, and takes
neither memory nor time beyond a stated bound. EDM2_FUZZ is the number of damages of each kind, 60 by default."""

import io
import json
import os
import time
import tracemalloc
import zipfile

import numpy as np
import official_files
import pytest
from data_files import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_port import CONFIG, PRESET

from backends.pipeline.checkpoints import states
from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.official import read_official
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot
from backends.pipeline.checkpoints.sources import open_sources
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import parse_train
from edm2_core.ema import Length, plan_from_json, plan_snapshots
from edm2_core.errors import InputError
from edm2_core.network import initialize, plan
from edm2_core.state import State

torch = pytest.importorskip("torch", reason="files of PyTorch are among those that are damaged")

_EXAMPLES = int(os.environ.get("EDM2_FUZZ", "60"))
_MEMORY = 256 << 20  # bytes, for files of at most half a megabyte
_SECONDS = 10.0
often = settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@st.composite
def damages(draw):
    """A few edits: at a place, bytes are taken out and others put in."""
    place = st.floats(0, 1, exclude_max=True)
    parts = st.one_of(
        st.binary(max_size=8),
        st.sampled_from(
            [
                b"\xff" * 4,
                b"\0" * 8,
                b"9" * 30,
                b"1e999",
                b"[" * 3000,
                b"-1",
                b"null",
                b"\x80\x04",
                b"r\xff\xff\xff\x7f",
            ]
        ),
    )
    return draw(st.lists(st.tuples(place, st.integers(0, 12), parts), min_size=1, max_size=4))


def damaged(whole, edits):
    for place, count, other in edits:
        at = int(place * len(whole))
        whole = whole[:at] + other + whole[at + count :]
    return whole


def ours_alone(read, *args):
    """Call ``read``; within its bounds it returns, or raises InputError."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        read(*args)
    except InputError:  # commands print it in one line, whatever the names in it
        pass
    finally:
        seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < _MEMORY
    assert seconds < _SECONDS


# ---- what is damaged, and how it is read


def snapshot(folder):
    path = folder / "0000001-0.100.safetensors"
    save_snapshot(path, Snapshot(params=initialize(CONFIG, seed=0), config=CONFIG, nimg=1000, length=Length.of(0.1)))
    return path, load_snapshot


def state(folder):
    params = initialize(CONFIG, seed=0)
    trained = [name for name, parameter in plan(CONFIG).parameters.items() if parameter.trained]
    path = states.store(folder, State.start(params, trained=trained, lengths=PRESET.hyper.lengths))

    def read(index):
        loaded = states.load_state(index.parent, CONFIG, PRESET.hyper.lengths)
        for part in states.parts(loaded).values():
            dict(part)

    return path / states.INDEX, read


def shard(folder):
    index, read = state(folder)
    return states.shard_of(index.parent, 0, 1), read


def official(folder):
    path = folder / official_files.NAME
    official_files.write(path, official_files.network)
    return path, read_official


def folder_of_torch_files(folder):
    for step in (1000, 2000):
        torch.save({"w": torch.ones(4, 4)}, folder / f"ema.{step}.pt")
    return folder / "ema.1000.pt", lambda path: open_sources(
        path.parent, described=Described(lengths=(Length.of(0.1),))
    )


def snapshot_plan(folder):
    path = folder / "plan.json"
    path.write_text(plan_snapshots(files=4, sigma_rel_range=(0.05, 0.2), duration=100_000).to_json())
    return path, lambda path: plan_from_json(path.read_text(errors="replace"), name=str(path))


def config(folder):
    made = TrainConfig(preset="toy", network=CONFIG, hyper=PRESET.hyper)
    Run(folder).save_config(made)
    return Run(folder).config_path, lambda path: Run(path.parent).config()


def log(folder):
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps({"nimg": 64 * i, "loss": 1.5, "seconds": i}) + "\n" for i in range(20)))
    return path, lambda path: (Run(path.parent).log(), list(Run(path.parent).telemetry()))


def read_dataset(path):
    data = open_dataset(path)
    data.read(np.arange(len(data)))
    if data.label_dim:
        data.labels(np.arange(len(data)))


def images_in_zip(folder):
    path = folder / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        labels = []
        for index in range(3):
            write(folder / f"{index}.png", seed=index)
            archive.write(folder / f"{index}.png", f"00000/{index}.png")
            labels.append([f"00000/{index}.png", index])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path, read_dataset


def dataset_json(folder):
    (folder / "data").mkdir()
    for index in range(3):
        write(folder / "data" / f"{index}.png", seed=index)
    path = folder / "data" / "dataset.json"
    path.write_text(json.dumps({"labels": [[f"{index}.png", index] for index in range(3)]}))
    return path, lambda path: read_dataset(path.parent)


def image(folder):
    write(folder / "data" / "0.png")
    return folder / "data" / "0.png", lambda path: read_dataset(path.parent)


def array(folder):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    (folder / "data.npz").write_bytes(buffer.getvalue())
    return folder / "data.npz", read_dataset


KINDS = (
    *(snapshot, state, shard, official, folder_of_torch_files, snapshot_plan, config, log),
    *(images_in_zip, dataset_json, image, array),
)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_damaged_file_is_read_or_refused(make, tmp_path):
    path, read = make(tmp_path)
    whole = path.read_bytes()
    read(path)  # as it is

    @often
    @given(damages())
    def check(edits):
        path.write_bytes(damaged(whole, edits))
        ours_alone(read, path)

    check()


# ---- options


FLAGS = (
    *("--duration", "--batch", "--lr", "--seed", "--sigma-rels", "--snapshot", "--status", "--checkpoint", "--keep"),
    *("--channels", "--channel-mult", "--blocks", "--attn-resolutions", "--dropout", "--label-dropout", "--holdout"),
    *("--ladder", "--switches", "--preset", "--precision", "--train", "--half-life", "--decay", "--rampup", "--betas"),
    *("--device", "--batch-per-device", "--timeout", "--workers", "--compile", "--telemetry", "--data", "--outdir"),
)
words = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "1e400", "nan", "inf", "none", "auto", "digits", "G", "9" * 40, "1.5Mi", "2Gi", "", "0.1"]
    ),
    st.text(st.characters(exclude_characters="-\0", exclude_categories=["Cs"]), max_size=8),
)


@often
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(words, max_size=3)), max_size=4))
def test_any_words_after_any_options_are_read_or_refused(chosen):
    line = [word for flag, values in chosen for word in (flag, *values)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", io.StringIO())
        patched.setattr("sys.stdout", io.StringIO())
        status = 0
        try:
            ours_alone(train_options_of, line)
        except SystemExit as ended:  # of the parser, which has said why
            status = ended.code
    assert status in (0, 2)


def train_options_of(line):
    return parse_train(line, prog="train", description="")
