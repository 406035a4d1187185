"""edm2 reconstruct: output, file formats of others, and that no file is ever half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from stored_files import unchecked

from backends.commands.cli import main
from backends.pipeline.checkpoints.combination import Combination
from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.outputs import Writer, plan_outputs
from backends.pipeline.checkpoints.reconstruct import averages, reconstruct
from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot
from backends.pipeline.checkpoints.sources import open_sources
from edm2_core.ema import Length, beta, coefficients, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2_core.errors import InputError

SHAPES = {"enc.w": (40, 50), "dec.w": (70, 33), "gain": (), "none": (0, 3)}
TIMES = range(1000, 9000, 1000)
LENGTHS = (0.05, 0.10)


def arrays(seed, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    made = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"count": np.array([seed, 7])}


def fill(folder, shapes=SHAPES):
    """A folder of snapshots of two lengths at eight times."""
    for i, t in enumerate(TIMES):
        for k, s in enumerate(LENGTHS):
            save_snapshot(folder / f"{t:012d}-{s:.3f}.safetensors", snapshot(arrays(2 * i + k, shapes), t, s))
    return folder


def snapshot(params, nimg, sigma_rel):
    return Snapshot(params=params, config=None, nimg=nimg, length=Length.of(sigma_rel))


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "stored")


def command(*words):
    return main([str(word) for word in ("reconstruct", *words)])


def reconstructed(source, **options):
    return reconstruct(open_sources(source), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_every_float16_is_read_and_written_exactly(tmp_path):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(2, -1)
    path = tmp_path / f"{1000:012d}-{0.05:.3f}.safetensors"
    save_snapshot(path, snapshot({"w": halves.astype(np.float32)}, 1000, 0.05))
    assert command(tmp_path, "--sigma-rels", 0.05, "--outdir", tmp_path / "out") == 0
    for made in (path, tmp_path / "out" / path.name):
        assert np.array_equal(load_snapshot(made).params["w"], halves)


def test_many_averages_are_written_in_one_pass_and_are_the_functions(folder, tmp_path, capsys):
    assert command(folder, "--sigma-rels", 0.03, 0.05, 0.2, "--outdir", tmp_path / "out", "--dtype", "float32") == 0
    expected = reconstructed(folder, sigma_rels=[0.03, 0.05, 0.2])
    for s, wanted in zip((0.03, 0.05, 0.2), expected, strict=True):
        made = load_snapshot(tmp_path / "out" / f"000000008000-{s:.3f}.safetensors")
        assert (made.nimg, made.length) == (8000, Length.of(s))
        assert all(np.array_equal(made.params[name], array) for name, array in wanted.params.items())
        assert made.params["count"].tolist() == [14, 7] or made.params["count"].tolist() == [15, 7]
    out = capsys.readouterr().out
    assert "16, from time 1000 to 8000; averages at 8000" in out
    assert "stored" in next(line for line in out.splitlines() if line.startswith("0.05"))
    assert set(contents(tmp_path / "out")) == {f"000000008000-{s:.3f}.safetensors" for s in (0.03, 0.05, 0.2)}


def test_default_outputs_are_float16_in_a_folder_beside(folder):
    command(folder, "--sigma-rels", 0.2, "--at", 4500)
    (path,) = (folder / "reconstructed").iterdir()
    made, (wanted,) = load_snapshot(path), reconstructed(folder, sigma_rels=[0.2], time=4500)
    assert path.name == "000000004500-0.200.safetensors"
    for name, array in wanted.params.items():
        as_stored = (
            array if array.dtype != np.float32 or not array.ndim else array.astype(np.float16).astype(np.float32)
        )
        assert np.array_equal(made.params[name], as_stored)


def test_arrays_may_have_lengths_of_their_own(folder, tmp_path):
    command(folder, "--sigma-rels", 0.2, "--override", "enc.*=0.03", "--outdir", tmp_path, "--dtype", "float32")
    made = load_snapshot(tmp_path / "000000008000-0.200.safetensors").params
    plain, short = reconstructed(folder, sigma_rels=[0.2, 0.03])
    assert np.allclose(made["enc.w"], short.params["enc.w"], rtol=1e-5, atol=1e-5)
    assert np.allclose(made["dec.w"], plain.params["dec.w"], rtol=1e-5, atol=1e-5)


def test_memory_and_threads_do_not_change_the_result(folder, monkeypatch):
    combination = Combination.of(open_sources(folder), sigma_rels=[0.03, 0.2])
    results = []
    for threads, most in ((1, 1 << 16), (4, 1 << 16), (4, 1 << 9)):
        monkeypatch.setattr("backends.pipeline.checkpoints.reconstruct.THREADS", threads)
        monkeypatch.setattr("backends.pipeline.checkpoints.reconstruct._BLOCKS", (1 << 8, most))
        results.append(averages(combination))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert all(np.array_equal(array, same.params[name]) for name, array in one.params.items())


def test_too_little_memory_is_refused(folder, capsys):
    assert command(folder, "--sigma-rels", 0.2, "--memory", 1000) == 2
    assert "must be at least" in capsys.readouterr().err
    assert not (folder / "reconstructed").exists()


def test_what_is_there_is_skipped_and_what_was_made_otherwise_is_not_overwritten(folder, capsys):
    command(folder, "--sigma-rels", 0.2)
    before = contents(folder / "reconstructed")
    stamp = next((folder / "reconstructed").iterdir()).stat().st_mtime_ns
    command(folder, "--sigma-rels", 0.2, 0.03)
    assert "exists" in capsys.readouterr().out
    after = contents(folder / "reconstructed")
    assert after | before == after
    assert len(after) == 2
    assert (folder / "reconstructed" / "000000008000-0.200.safetensors").stat().st_mtime_ns == stamp
    assert command(folder, "--sigma-rels", 0.2, "--override", "enc.*=0.03") == 2
    assert "made otherwise: choose another --outdir" in capsys.readouterr().err
    assert contents(folder / "reconstructed") == after


def test_the_predicted_error_comes_first_and_may_refuse(folder, capsys):
    assert command(folder, "--sigma-rels", 0.01, "--max-error", 0.1) == 2
    said = capsys.readouterr()
    assert "profile error" in said.out
    assert "must be at most 0.1, got 0." in said.err
    assert not (folder / "reconstructed").exists()
    assert command(folder, "--sigma-rels", 0.05, "--max-error", 0, "--dry-run") == 0  # stored: exact
    assert not (folder / "reconstructed").exists()


BREAKS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "foreign": lambda path: path.write_bytes(b"hello" * 100),
    "missing": lambda path: save_snapshot(path, snapshot(arrays(0, {"enc.w": (40, 50)}), 5000, 0.05)),
    "shape": lambda path: save_snapshot(path, snapshot(arrays(0, SHAPES | {"enc.w": (50, 40)}), 5000, 0.05)),
    "nonfinite": lambda path: poison(path),
}
WHY = {
    "truncated": "cut short",
    "foreign": "must be a safetensors file",
    "missing": "got no dec.w",
    "shape": r"enc.w of shape \(50, 40\) instead of \(40, 50\)",
    "nonfinite": "dec.w must be finite",
}


def poison(path):
    data = bytearray(unchecked(path.read_bytes()))
    data[-20:-18] = np.array([np.inf], "<f2").tobytes()  # in the float16 arrays, which come last
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_file_is_named_and_may_be_left_out(folder, tmp_path, way, capsys):
    broken = folder / "000000005000-0.050.safetensors"
    BREAKS[way](broken)
    names = [path for path in sorted(folder.iterdir()) if path != broken]
    with pytest.raises(InputError, match=WHY[way] if way != "nonfinite" else "must be finite"):
        reconstructed(folder, sigma_rels=[0.2])
    assert command(folder, "--sigma-rels", 0.2, "--outdir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert str(broken) in said
    assert len(said.strip().splitlines()) <= 1 + said.count("weights/s")  # one line, and progress
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True
    assert (
        command(folder, "--sigma-rels", 0.2, "--outdir", tmp_path / "out", "--skip-broken", "--dtype", "float32") == 0
    )
    assert f"skipped   {broken}" in capsys.readouterr().out
    (wanted,) = reconstructed(names, sigma_rels=[0.2])
    made = load_snapshot(tmp_path / "out" / "000000008000-0.200.safetensors")
    assert np.array_equal(made.params["enc.w"], wanted.params["enc.w"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--sigma-rels must be one or more lengths, got none"),
        (["--sigma-rels", 0.3], r"sigma_rel must be within (0, 0.2887), got 0.3"),
        (["--sigma-rels", 0.1, "--at", 500], "must be from 1000 to 8000 images, got 500"),
        (["--sigma-rels", 0.1, "--at", 9000], "must be from 1000 to 8000 images, got 9000"),
        (["--sigma-rels", 0.1, "--override", "nope*=0.1"], "must match an array, got 'nope*'"),
        (["--sigma-rels", 0.1, "--override", "0.2"], "--override must be PATTERN=LENGTH"),
        (["--sigma-rels", 0.1, 0.1001], "must differ in their first three digits"),
        (["--sigma-rels", 0.1, "--source-raw", 1, "--source-half-life", 2], "exclude each other"),
        (["--sigma-rels", 0.1, "--source-update-every", 0], "must be at least 1, got 0"),
        (["--sigma-rels", 0.1, "--memory", "much"], "--memory must be a whole number"),
    ],
)
def test_bad_options_are_one_line(folder, options, message, capsys):
    before = contents(folder)
    assert command(folder, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert contents(folder) == before


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert command(tmp_path, "--sigma-rels", 0.1) == 2
    assert "got nothing in" in capsys.readouterr().err


BIG = {f"layer{i}": (512, 2048) for i in range(8)}
START = [sys.executable, "-c", "import sys; from backends.commands.cli import main; sys.exit(main())", "reconstruct"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_what_was_stopped_goes_on_and_ends_the_same(tmp_path, signum):
    stored = fill(tmp_path / "stored", BIG)
    slow = (
        "import sys, time; from backends.pipeline.checkpoints import outputs; outputs._JOURNAL_EVERY = 0.05\n"
        "write = outputs.Writer._write\n"
        "def slowly(*a): time.sleep(0.05); write(*a)\n"
        "outputs.Writer._write = slowly\n"
        "from backends.commands.cli import main; sys.exit(main())"
    )
    words = [str(stored), "--sigma-rels", "0.03", "0.2", "--outdir"]
    subprocess.run([*START, *words, str(tmp_path / "whole")], check=True, capture_output=True)
    parts = tmp_path / "parts"
    process = subprocess.Popen([sys.executable, "-c", slow, "reconstruct", *words, str(parts)])
    while not (parts / ".reconstruct.json").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signum)
    assert process.wait() == (130 if signum == signal.SIGINT else -9)
    assert not list(parts.glob("*.safetensors"))  # nothing that looks whole
    assert 0 < json.loads((parts / ".reconstruct.json").read_text())["done"] < 128
    done = subprocess.run([*START, *words, str(parts)], check=True, capture_output=True, text=True)
    assert "resumed" in done.stdout
    assert contents(parts) == contents(tmp_path / "whole")


def test_two_at_once_do_not_write_into_one_folder(folder, tmp_path, capsys):
    """Not even with other dtypes, whose files have the same names."""
    combination = Combination.of(open_sources(folder), time=None, sigma_rels=[0.07])
    todo, _ = plan_outputs(tmp_path / "out", combination, dtype="float32")
    with Writer(todo, combination, dtype="float32", memory=1 << 24) as writer:
        assert command(folder, "--sigma-rels", 0.07, "--outdir", tmp_path / "out") == 2
        assert "one process at a time may write averages into a folder" in capsys.readouterr().err
        list(writer.run(lambda: False))
        (path,) = writer.finish()
    assert list(contents(tmp_path / "out")) == [path.name]
    assert load_snapshot(path).params["enc.w"].dtype == np.float32
    with (
        pytest.raises(InputError, match="which another process has written: run again"),
        Writer(todo, combination, dtype="float32", memory=1 << 24),
    ):
        pass


def test_a_full_disk_is_found_before_the_work_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert command(folder, "--sigma-rels", 0.2, "--outdir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "must have room, got 'No space left on device'" in said
    assert len(said.strip().splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


STEPS, EVERY = 600, 20


def walk():
    t = np.arange(1, STEPS + 1)[:, None] / STEPS
    return np.cos(4 * t + np.arange(9)).astype(np.float32)


def average_of(weights, keep):
    """What ``keep(step)`` (1 for the first) leaves of an average, after each step."""
    average, history = weights[0], []
    for step, w in enumerate(weights, 1):
        stay = keep(step)
        average = w if step == 1 else stay * average + (1 - stay) * w
        history.append(average)
    return history


def truth(sigma_rel):
    return average_of(walk(), lambda step: beta(sigma_rel, t_next=step, t_delta=1))[-1]


@pytest.mark.parametrize(
    ("history", "length"),
    [
        (lambda: average_of(walk(), lambda step: beta(0.08, t_next=step, t_delta=1)), Length.of(0.08)),
        (lambda: average_of(walk(), lambda step: 0.95), Length.half_life(np.log(2) / -np.log(0.95))),
        (lambda: list(walk()), Length.raw(1.0)),
    ],
    ids=["power", "traditional", "raw"],
)
def test_plain_files_named_by_step_are_rebuilt_from(tmp_path, history, length):
    for step, w in enumerate(history(), 1):
        if step % EVERY == 0:
            save_file({"w": w}, tmp_path / f"model-{step:06d}.safetensors")
    with pytest.raises(InputError, match="does not say what was averaged: add --source-sigma-rels"):
        open_sources(tmp_path)
    sources = open_sources(tmp_path, described=Described(lengths=(length,)))
    combination = Combination.of(sources, sigma_rels=[0.15])
    assert distance(averages(combination)) < 0.08
    assert combination.error.profile[0] > 0.01  # the prediction says that it is not exact


def distance(reconstructed):
    """Of the one average reconstructed from the true one, of length 0.15, relatively."""
    (average,) = reconstructed
    return np.linalg.norm(average.params["w"] - truth(0.15)) / np.linalg.norm(truth(0.15))


def test_files_of_ema_pytorch_are_read_and_its_interval_is_corrected_for(tmp_path):
    torch = pytest.importorskip("torch")
    every, requested = 2, (0.05, 0.2)
    for index, s in enumerate(requested):
        gamma = sigma_rel_to_gamma(s)
        average = None
        for step, w in enumerate(walk()):  # as KarrasEMA does: a one-step beta every so many steps, and a copy first
            if step % every == 0:
                average = w if average is None else average + (1 - (1 - 1 / (step + 2)) ** (gamma + 1)) * (w - average)
            if (step + 1) % EVERY == 0:
                state = {"initted": torch.tensor(True), "step": torch.tensor(step + 1)}
                state |= {"ema_model.w": torch.from_numpy(average)}
                torch.save({n: t.to(torch.float16) for n, t in state.items()}, tmp_path / f"{index}.{step + 1}.pt")
    with pytest.raises(InputError, match="does not say what was averaged"):
        open_sources(tmp_path)
    lengths = tuple(map(Length.of, requested))
    sources = open_sources(tmp_path, described=Described(lengths=lengths, update_every=every))
    assert sources[0].length.value == pytest.approx(gamma_to_sigma_rel((sigma_rel_to_gamma(0.05) + 1) / 2 - 1))
    corrected = distance(reconstruct(sources, sigma_rels=[0.15]))
    assert corrected < 0.02
    ignored = open_sources(tmp_path, described=Described(lengths=lengths))
    assert distance(reconstruct(ignored, sigma_rels=[0.15])) > 5 * corrected
    with pytest.raises(InputError, match="nothing shorter can be made of it"):
        open_sources(tmp_path, described=Described(lengths=lengths, update_every=100))


def test_a_torch_file_with_code_in_it_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"ema_model.w": torch.zeros(2), "evil": Path("x")}, tmp_path / "0.100.pt")
    with pytest.raises(
        InputError, match=r"0\.100\.pt must hold tensors and plain values, got pathlib\S+, which may run code"
    ):
        open_sources(tmp_path, described=Described(lengths=(Length.of(0.05),)))


def test_coefficients_are_those_of_the_core(folder):
    sources = open_sources(folder)
    t_in, s_in = np.array([s.time for s in sources]), np.array([s.length.value for s in sources])
    wanted = coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=4500, out_sigma_rel=0.2)
    combination = Combination.of(sources, sigma_rels=[0.2], time=4500)
    assert np.array_equal(combination.weights_of("enc.w"), wanted.T.astype(np.float32))


@pytest.mark.parametrize("command_name", ["reconstruct", "ema-plot"])
def test_a_command_reads_each_header_once(folder, headers_read, command_name):
    stored = sorted(folder.iterdir())
    poison(stored[4])  # found while averages are computed
    assert main([command_name, str(folder), "--sigma-rels", "0.03", "0.2", "--skip-broken"]) == 0
    assert sorted(headers_read) == stored
