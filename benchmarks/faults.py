"""What is lost when machines fail: kills, damaged files, full disks, peers that are gone; writes docs/reliability.md.

    python -m benchmarks.faults [--torch 200] [--jax 30] [--mlx 15]

Commands run in processes that are forked with their framework imported, so that a trial takes a second. A killed
command is given again, and what it leaves is compared, byte for byte, with what it leaves undisturbed. Twenty minutes.
"""

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot
from backends.pipeline.checkpoints.states import INDEX, arrays_of, shard_of
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.agreement import stored_state
from backends.pipeline.runs.folder import Run
from edm2_core.errors import InputError
from edm2_core.state import State

from .ema_reconstruct import machine
from .fault_inputs import COMMANDS, SMALL, make_inputs

TRAIN = f"{SMALL} --duration 2Ki --no-picture --outdir run"
KEPT = (".safetensors", ".png", ".zip", ".npz")  # files whose bytes are compared
GROWTH = {"torch": 1500, "jax": 1500, "mlx": 300}  # steps
ROWS: list[str] = []


def main(
    *, torch: int = 200, jax: int = 30, mlx: int = 15, pairs: int = 10, commands: int = 20, flips: int = 2000
) -> None:
    """Kill training of each port so many times, that of two processes PAIRS times, the other commands COMMANDS times
    each, and flip FLIPS bytes a file."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for port, trials in (("torch", torch), ("jax", jax), ("mlx", mlx)):
            if trials:
                kills(f"{port}: train", trials, f"backends.{port}.train", TRAIN)
        make_inputs()
        for name, (module, words) in COMMANDS.items():
            kills(name, commands, module, words)
        damages(flips)
        full_disks()
        pairs_killed(pairs)
        peers()
        for port, steps in GROWTH.items():
            growth(port, steps)
    table = "\n".join(ROWS)
    text = f"""# Reliability

Measured by `python -m benchmarks.faults` (`nox -s faults`) on {machine()}.

| fault | tried | what happened | lost |
|---|---|---|---|
{table}

- Kills are SIGKILL at moments drawn evenly over the whole command. "Equal" is byte for byte, of every snapshot, state
  and picture, after the same command was given once more. While a killed run rests, every visible file is read.
- A flipped byte is found by checksums: of the header and of each 16,384 elements of a snapshot or shard, of a state's
  index, of config.json, of a dataset.json that was written here, of each line of the log, which is then passed over and
  said; in a .zip by its own. A log that is cut short is the log of a run that was killed then.
- The state is stored at intervals, at signals and at errors, all processes together. Where one of several is gone, or
  fails within a step, the others store the state after the last complete step if each has all of it: in PyTorch without
  `--shard`, and in MLX. Otherwise the last interval is lost: JAX gives a step the memory of its state, and after a
  process that hangs no call returns. States are complete in all shards or not there.
"""
    print(text)
    (Path(__file__).parents[1] / "docs" / "reliability.md").write_text(text)


def row(fault: str, tried: object, happened: str, lost: str) -> None:
    ROWS.append(f"| {fault} | {tried} | {happened} | {lost} |")
    print(ROWS[-1], flush=True)


# ---- kills


def kills(name: str, trials: int, module: str, words: str) -> None:
    """A row for ``trials`` kills of a command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, *([f"{module.rpartition('.')[0]}.trainer"] if "train" in module else [])])
    job = Job(context, module, words, Path("inputs"))
    whole, seconds = job.undisturbed()
    moments = [random.Random(i).uniform(0, seconds) for i in range(trials)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: job.trial(i, moments[i], whole), range(trials)))
    stopped, equal, readable = (sum(column) for column in zip(*found, strict=True))
    lost = "none" if equal == readable == trials else "see left"
    row(f"{name}, kill -9", f"{trials} ({stopped} before its end)", f"{equal} equal, {readable} whole at rest", lost)


@dataclass
class Job:
    context: multiprocessing.context.ForkServerContext
    module: str
    words: str
    inputs: Path

    def undisturbed(self) -> tuple[dict[str, bytes], float]:
        """What the command leaves, and the seconds of its second run; the first one fills caches."""
        for name in ("warm", "whole"):
            folder = self._folder(name)
            begin = time.monotonic()
            process = self._start(folder)
            process.join()
            seconds = time.monotonic() - begin
            if process.exitcode:
                raise InputError(
                    f"{self.module} {self.words} must succeed, got {process.exitcode}: see {folder}/said.txt"
                )
        return contents(folder), seconds

    def trial(self, index: int, moment: float, whole: dict[str, bytes]) -> tuple[bool, bool, bool]:
        """Whether the command was killed before its end, ended equal, and left only whole files."""
        folder = self._folder(f"trial-{index}")
        process = self._start(folder)
        process.join(moment)
        stopped = process.is_alive()
        process.kill()
        process.join()
        readable = all_whole(folder)
        process = self._start(folder)
        process.join()
        left = contents(folder)  # killed after its last write, a command may refuse to write what is there
        equal = left == whole
        if equal and readable:
            shutil.rmtree(folder)
        else:
            different = [name for name in left.keys() | whole.keys() if left.get(name) != whole.get(name)]
            print(f"{folder}: {', '.join(sorted(different))} after {moment:.2f} s, then status {process.exitcode}")
        return stopped, equal, readable

    def _folder(self, name: str) -> Path:
        folder = Path(f"{self.module}-{abs(hash(self.words)) % 1000}-{name}").absolute()
        shutil.copytree(self.inputs, folder) if self.inputs.exists() else folder.mkdir()
        return folder

    def _start(self, folder: Path) -> multiprocessing.process.BaseProcess:
        process = self.context.Process(target=execute, args=(self.module, self.words, str(folder)))
        process.start()
        return process


def execute(module: str, words: str, folder: str) -> None:
    """Run a command in ``folder``; its output goes to said.txt there."""
    os.chdir(folder)
    sys.path.insert(0, folder)  # of the extractor of the sweep
    with open("said.txt", "a", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        sys.exit(import_module(module).main(words.split()))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in KEPT}


def all_whole(folder: Path) -> bool:
    """Whether every visible file can be read."""
    try:
        for path in folder.rglob("snapshots/*.safetensors"):
            load_snapshot(path)
        for config_path in folder.rglob("config.json"):
            run = Run(config_path.parent)
            if run.state_path is not None:
                digest(stored_state(run, run.config()))
        for path in folder.rglob("*.png"):
            Image.open(path).load()
        for path in (*folder.rglob("config.json"), *folder.rglob("dataset.json")):
            json.loads(path.read_text())
        return True
    except (InputError, OSError, ValueError) as error:
        print(error)
        return False


# ---- damages


def damages(count: int) -> None:
    """A row for each kind of file: random bytes flipped, and cut short."""
    run = Run("inputs/run")
    config, state, labels = run.config(), run.state_path, Path("inputs/data/dataset.json")
    snapshot = next(run.snapshots_path.glob("*.safetensors"))
    if state is None:
        raise InputError(f"a run must have a state to be damaged, got none in {run.states_path}")
    readers: dict[str, tuple[Path, Callable[[], object]]] = {
        "snapshot": (snapshot, lambda: digest(load_snapshot(snapshot))),
        "state: a shard": (shard_of(state, 0, 1), lambda: digest(stored_state(run, config))),
        "state: the index": (state / INDEX, lambda: digest(stored_state(run, config))),
        "config.json": (run.config_path, lambda: run.config()),
        "log.jsonl": (run.log_path, lambda: run.log()),
        "dataset.json": (labels, lambda: open_dataset(labels.parent).labels(np.arange(300)).tolist()),
        "a .zip of images": (Path("inputs/data.zip"), lambda: digest_of_data(Path("inputs/data.zip"))),
    }
    for name, (path, read) in readers.items():
        said = StringIO()
        logging.getLogger("edm2").addHandler(logging.StreamHandler(said))
        whole, wanted, results = path.read_bytes(), read(), {"error": 0, "identical": 0, "silent": 0}
        for content in damaged(whole, count, cuts=0 if name == "log.jsonl" else count // 10):
            path.write_bytes(content)
            said.truncate(0)
            try:
                same = read() == wanted
                named = str(path) in said.getvalue()  # a damaged line of the log, which is passed over
                results["identical" if same else "error" if named else "silent"] += 1
            except InputError as error:
                results["error" if str(path) in str(error) else "silent"] += 1
        path.write_bytes(whole)
        happened = (
            f"{results['error']} named the file, {results['identical']} changed nothing, {results['silent']} silent"
        )
        row(
            f"{name}: a byte flipped, or cut short",
            sum(results.values()),
            happened,
            "none" if not results["silent"] else "see left",
        )


def damaged(whole: bytes, count: int, *, cuts: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        content, at = bytearray(whole), rng.randrange(len(whole))
        content[at] ^= 1 << rng.randrange(8)
        yield bytes(content)
    for _ in range(cuts):
        yield whole[: rng.randrange(len(whole))]


def digest_of_data(path: Path) -> bytes:
    data = open_dataset(path)
    return data.read(np.arange(len(data))).tobytes() + data.labels(np.arange(len(data))).tobytes()


def digest(value: Snapshot | State) -> bytes:
    """A hash of all that was read."""
    if isinstance(value, State):
        return b"".join(array.tobytes() for array in arrays_of(value).values())
    arrays = sorted(value.params.items())
    return repr([(name, array.tobytes()) for name, array in arrays] + [replace(value, params={})]).encode()


# ---- full disks, peers, growth


def full_disks() -> None:
    """A row for a run that may write no file beyond a size."""
    kept = 0
    sizes = (1_000, 20_000, 200_000, 400_000, 600_000)
    words = "-m backends.torch.train --duration 6Ki --device cpu --no-picture --outdir"
    for size in sizes:
        folder = Path(f"full-{size}")
        shutil.copytree("inputs/run", folder)
        before, command = contents(folder), [sys.executable, *words.split(), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=partial(limit_files, size))
        after, line = contents(folder), (done.stderr.strip().splitlines() or [""])[-1]
        clear = done.returncode == 2 and line.startswith("error: ")
        intact = all(after.get(name) == content for name, content in before.items() if "snapshots" in name)
        kept += clear and intact and all_whole(folder) and not list(folder.rglob("*.tmp"))
    happened = f"{kept} one line, earlier files whole, no remains"
    row("no file may grow beyond a size", len(sizes), happened, "since the last state")


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def peers() -> None:
    """Rows for two processes of which one is killed, or stopped."""
    for port in ("torch", "jax", "mlx"):
        for signum in (signal.SIGKILL, signal.SIGSTOP):
            seconds, status, said = pair(port, signum)
            happened = f"the other ended after {seconds:.0f} s with status {status}: {said[-1][:110]}"
            saved = any(line.startswith("saved    the state") for line in said)
            lost = "none: it stored the state" if saved else "since the last state"
            row(f"{port}: {signum.name} to one of two, --timeout 10", 1, happened, lost)


def started(port: str, folder: Path, words: str) -> list[subprocess.Popen[bytes]]:
    """Two processes of a train command, as each port starts them; what they say goes to said-0.txt and said-1.txt."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:32323"], ["127.0.0.1:32324"]]))
    commands = []
    for rank in range(2):
        of_port = {
            "torch": {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29633},
            "jax": {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:29634", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": rank},
            "mlx": {"MLX_RANK": rank, "MLX_HOSTFILE": hosts.absolute()},
        }[port]
        environment = {**os.environ, **{name: str(value) for name, value in of_port.items()}}
        line = [sys.executable, "-m", f"backends.{port}.train", *words.split()]
        with open(folder / f"said-{rank}.txt", "a", encoding="utf-8") as said:
            commands.append(subprocess.Popen(line, cwd=folder, env=environment, stdout=said, stderr=said))
    return commands


def pair(port: str, signum: signal.Signals) -> tuple[float, int, list[str]]:
    """Seconds until the first of two processes ends, its status and its lines, after the second got a signal."""
    folder = Path(tempfile.mkdtemp(dir="."))
    words = f"{SMALL} --duration 1Mi --status 256 --no-picture --outdir run --timeout 10"
    commands = started(port, folder, words)
    while "img/s" not in (folder / "said-0.txt").read_text() and commands[0].poll() is None:
        time.sleep(0.2)
    commands[1].send_signal(signum)
    begin = time.monotonic()
    status = commands[0].wait(timeout=300)
    seconds = time.monotonic() - begin
    commands[1].kill()
    text = (folder / "said-0.txt").read_text()
    return seconds, status, text.strip().replace("|", "/").splitlines()


def pairs_killed(trials: int) -> None:
    """A row for both of two processes killed, which divide the weights and store a shard of each state."""
    words = f"{TRAIN} --shard"

    def run(name: str, moment: float | None) -> float:
        folder = Path(f"pair-{name}")
        folder.mkdir(exist_ok=True)
        begin, commands = time.monotonic(), started("torch", folder, words)
        if moment is not None:
            time.sleep(moment)
            for command in commands:
                command.kill()
        for command in commands:
            command.wait(timeout=300)
        return time.monotonic() - begin

    seconds, equal, readable = run("whole", None), 0, 0
    for i in range(trials):
        run(str(i), random.Random(i).uniform(0, seconds))
        readable += all_whole(Path(f"pair-{i}"))
        run(str(i), None)
        equal += contents(Path(f"pair-{i}")) == contents(Path("pair-whole"))
    lost = "none" if equal == readable == trials else "see left"
    row(
        "torch: train, two processes with --shard, both kill -9",
        trials,
        f"{equal} equal, {readable} whole at rest",
        lost,
    )


def growth(port: str, steps: int) -> None:
    """A row for memory and open files over so many steps with snapshots, states and telemetry."""
    words = (
        f"-m backends.{port}.train {SMALL} --duration {steps * 64} --telemetry 10 --no-picture --outdir grown-{port}"
    )
    process = subprocess.Popen([sys.executable, *words.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, seen = Path(f"grown-{port}/log.jsonl"), []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            nimg = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["nimg"]
            pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            if pages:  # it has not ended
                seen.append((nimg // 64, pages * 4096 / 2**20, files))
        except (OSError, ValueError, IndexError):
            continue
    later = [part for part in seen if part[0] >= 100]
    thirds = [later[i * (len(later) - 1) // 3] for i in range(4)]
    memory = "MiB at step " + ", ".join(f"{step}: {size:.0f}" for step, size, _ in thirds)
    files_open = f"open files {later[0][2]} and {later[-1][2]}"
    row(f"{port}: {steps} steps with snapshots, states, telemetry", 1, f"{memory}; {files_open}", "none")


if __name__ == "__main__":
    tyro.cli(main)
