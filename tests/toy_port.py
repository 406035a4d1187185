"""A port small enough to see through: its training depends on every input and on nothing else."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np

from backends.pipeline.checkpoints.states import load_state
from backends.pipeline.data.batches import prepared
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.command_line import flag, parse
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import parse_train
from backends.pipeline.runs.resolve import resolve
from backends.pipeline.runs.team import PeerLost, Team
from backends.pipeline.runs.training import run_training
from backends.ports import Machine
from backends.trainer import Trainer
from edm2_core.codec import DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, initialize, plan
from edm2_core.presets import PRESETS, Preset
from edm2_core.state import State

PROG = "python -m backends.toy.train"
CONFIG = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=10,
    model_channels=4,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=4,
    logvar_channels=4,
)
PRESET = Preset(
    network=CONFIG,
    hyper=replace(PRESETS["digits"].hyper, duration=4096, batch=64, snapshot=1024, rampup=512, decay=20),
)


class Killed(BaseException):
    """The process is gone: nothing more is stored."""


class ToyTrainer(Trainer):
    """Moves each weight along the sine of itself and of the batch; keeps real averages."""

    device, measures = "numpy", False

    def __init__(self, config, machine=Machine(), *, team=Team()):
        super().__init__()
        self.team = team
        self.rank, self.world, self.batch, self.precision = team.rank, team.world, config.hyper.batch, config.precision
        params = initialize(config.network, seed=config.seed)
        trained = [name for name, parameter in plan(config.network).parameters.items() if parameter.trained]
        self.load_state(State.start(params, trained=trained, lengths=config.hyper.lengths))
        self.seen, self.rates, self.resumed, self.dropped = [], [], False, 0

    @property
    def nimg(self):
        return self._nimg

    def place(self, batch, /):
        return batch

    def take_evaluation(self, batch, unit_noise, sigma, /):
        mean = np.float32(np.mean(self.params["unet.out_conv.weight"]))
        return np.abs(batch.images.mean(axis=(1, 2, 3)) + mean + unit_noise.mean(axis=(1, 2, 3)) * sigma)

    def take_step(self, batch, *, lr):
        images, labels, _ = prepared(batch, DataFormat(), label_dim=10)
        own = images.sum() + (0 if labels is None else labels.argmax(1).sum())
        share = np.float32(sum(float(part) for part in self.team.gather(np.asarray(own))))
        self.seen.append((self.nimg, images.shape, None if labels is None else labels.shape))
        self.rates.append(lr)
        self.dropped += 0 if labels is None else int((labels.sum(axis=1) == 0).sum())
        for name, first in self.moments1.items():
            gradient = np.sin(self.params[name] + share)
            self.moments1[name] = np.asarray(0.9 * first + 0.1 * gradient, np.float32)
            self.moments2[name] = np.asarray(0.99 * self.moments2[name] + 0.01 * gradient**2, np.float32)
            self.params[name] = np.asarray(self.params[name] - lr * self.moments1[name], np.float32)
        self._nimg, self.steps = self.nimg + self.batch, self.steps + 1
        for length, average in self.kept.items():
            keep = length.beta(t_next=self.nimg, t_delta=self.batch)
            for name in average:
                average[name] = np.asarray(keep * average[name] + (1 - keep) * self.params[name], np.float32)
        return float(share), 0

    def take_measured_step(self, batch, *, lr):
        raise TypeError("the toy has no telemetry")

    def fetch(self, values):
        return np.array(values)

    def mean_over_processes(self, value):
        return float(np.mean(self.team.gather(np.asarray(value))))

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)

    def images_at_a_time(self, count):
        return count

    def parameters(self, names=None, /):
        return some(self.params, names)

    def average(self, length, names=None, /):
        return some(self.kept[length], names)

    def state_alone(self, error, /):
        return self.state()

    def state(self, names=None, /):
        return State(
            params=some(self.params, names),
            moments1=some(self.moments1, names),
            moments2=some(self.moments2, names),
            averages={length: some(average, names) for length, average in self.kept.items()},
            nimg=self.nimg,
            steps=self.steps,
        )

    def load_state(self, state, /):
        self.params, self.moments1, self.moments2 = dict(state.params), dict(state.moments1), dict(state.moments2)
        self.kept = {length: dict(average) for length, average in state.averages.items()}
        self._nimg, self.steps, self.resumed = state.nimg, state.steps, True


def some(arrays, names):
    return {name: np.array(array) for name, array in arrays.items() if names is None or name in names}


class ToySampler:
    """Images that depend on noise, labels, network and guide, row by row. Keeps what it was called with."""

    calls: list

    def __init__(self):
        self.calls = []

    def __call__(self, config, params, *, guide=None):
        mean = float(np.mean(params["unet.out_conv.weight"]))

        def sample(noise, labels=None, **solver):
            self.calls.append({"n": len(noise), "labels": labels, "guide": guide, "mean": mean, **solver})
            hue = 0 if labels is None else labels.argmax(1)[:, None, None, None] / 10
            churn = 0
            if solver.get("S_churn"):
                churn = sum(0.1 * array for array, _ in zip(solver["churn_noise"], range(3), strict=False))
            return np.tanh(noise + churn + mean).astype(np.float32) * 0.8 + np.float32(0.1) * hue

        return sample


def words(**options):
    """Options as they are typed: ``words(lr=0.1, dry_run=True)`` is --lr 0.1 --dry-run."""
    line = []
    for name, value in options.items():
        if value is not False:
            line.append(flag(name))
        if not isinstance(value, bool):
            line += map(str, value if isinstance(value, tuple) else (value,))
    return line


def options_of(cls, **options):
    return parse(cls, words(**options), prog="prog", description="What it does.")


def train_options(**options):
    return parse_train(words(**options), prog="prog", description="What it does.")


def config_of(dataset="digits", previous=None, **options):
    """The config that these options make, on a dataset or its name, fresh or going on from ``previous``."""
    asked = train_options(**options) if previous is None else replace(train_options(**options), previous=previous)
    return resolve(asked, open_dataset("digits") if dataset == "digits" else dataset, previous)


def run_toy(trainer, sampler, *, prog="python -m backends.toy.train", **options):
    return run_training(train_options(**options), trainer, sampler, prog=prog)


def train_only(trainer, outdir, duration, **options):
    """Of several processes, only the first may then read the run."""
    assert run_toy(trainer, ToySampler(), outdir=outdir, duration=duration, **options) == 0


def train(trainer, outdir, duration, **options):
    """The state that ``trainer`` leaves on the toy's network, in a run that is new or goes on."""
    if not Path(outdir).exists():
        options |= {"preset": "toy", "data": "digits"}
    train_only(trainer, outdir, duration, **options)
    lengths = (Length.of(0.05), Length.of(0.10))
    return load_state(Run(outdir).state_path, CONFIG, lengths)


def together(work, count=3):
    """What ``work(team)`` returns or raises in each of ``count`` processes, here threads."""
    barrier, slots = Barrier(count, timeout=30), [None] * count

    def of(rank):
        def all_gather(data):
            assert data.dtype == np.uint8
            slots[rank] = data.copy()
            try:
                barrier.wait()
                rows = np.stack(slots)
                barrier.wait()
            except BrokenBarrierError as error:
                raise PeerLost("all processes must stay until the end") from error
            return rows

        try:
            return work(Team(rank, count, all_gather))
        except InputError as error:
            return error
        except ZeroDivisionError as error:
            barrier.abort()  # the connections of a process that ends are closed
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(of, range(count)))


def train_toy(outdir="run", trainer=ToyTrainer, sampler=None, **options):
    """Run the loop on the toy; returns (status, trainer, run)."""
    opened = []

    def open_trainer(config, machine):
        opened.append(trainer(config, machine))
        return opened[0]

    if not (outdir and Run(outdir).exists()):
        options = {"preset": "toy", "data": "digits"} | options
    if outdir:
        options["outdir"] = outdir
    status = run_toy(open_trainer, sampler or ToySampler(), prog=PROG, **options)
    return status, opened[0] if opened else None, Run(outdir) if outdir else None


def contents(run):
    """Everything that a run's end consists of, but for the clock."""
    log = [{key: record[key] for key in ("nimg", "loss", "lr", "nonfinite")} for record in run.log()]
    files = {str(p.relative_to(run.path)): p.read_bytes() for p in run.path.rglob("*.safetensors")}
    return log, files, run.config(), (run.path / "samples/lengths.png").read_bytes()
