"""python -m benchmarks.scale: what training XS to XXL takes on many devices, computed, and the model of it checked with
1, 2 and 4 processes here. Writes docs/scale.md.

Computed are times, from one measured step, the bytes that are sent and kept, and bandwidths. Nothing here was run on
more than one GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median

from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.space import snapshot_count, state_bytes
from benchmarks.ema_reconstruct import machine
from edm2_core.network import NetworkConfig, activation_count, multiply_adds, parameter_count
from edm2_core.presets import preset

SIZES = ("xs", "s", "m", "l", "xl", "xxl")
GiB = 1 << 30
# measured: docs/performance.md, S at 64x64x4, batch 128, one H200, bfloat16, compiled
_STEP, _BATCH, _ACTIVATIONS = 0.1919, 128, 18.7 * GiB
_COPY = 3.0e9  # bytes of a state that are copied, checked and hashed a second by a process: `state` below


@dataclass(frozen=True)
class Cluster:
    """``devices``, so many in a ``host``. Bytes a second: ``inside`` from one device to others of its host, ``between``
    from a host to others. ``speed``: relative to the device of the measured step."""

    name: str
    devices: int
    host: int
    memory: float
    inside: float
    between: float
    speed: float = 1.0

    def all_reduce(self, count: float) -> float:
        """Seconds to sum ``count`` bytes over all: within hosts, between them in parallel, within hosts again."""
        near, hosts = min(self.host, self.devices), ceil(self.devices / self.host)
        within = 2 * (near - 1) / near * count / self.inside
        across = 2 * (hosts - 1) / hosts * count / self.between
        return within + across

    def all_gather(self, count: float) -> float:
        """Seconds until all have ``count`` bytes, of which each had a part; as long as to sum and divide them."""
        return self.all_reduce(count) / 2


# H100 SXM: 80 GB, NVLink 450 GB/s each way; 400 Gb/s between hosts, one port a host and one a GPU.
# TPU v5p: 95 GB, 4.8 Tb/s of links a chip, half of it each way; its speed is the ratio of nominal peaks, 459 to 989.
CLUSTERS = (
    Cluster("8 H100", 8, 8, 80e9, 450e9, 50e9),
    Cluster("32 H100", 32, 8, 80e9, 450e9, 50e9),
    Cluster("256 H100", 256, 8, 80e9, 450e9, 50e9),
    Cluster("256 H100, 8 ports", 256, 8, 80e9, 450e9, 400e9),
    Cluster("v5p-512 (256 chips)", 256, 256, 95e9, 300e9, 300e9, speed=459 / 989),
)


@dataclass(frozen=True)
class Estimate:
    """A size on a cluster, with one batch of the paper shared by all devices. Bytes and seconds."""

    size: str
    cluster: Cluster

    @property
    def config(self) -> TrainConfig:
        one = preset(f"img512-{self.size}")
        return TrainConfig(preset=f"img512-{self.size}", network=one.network, hyper=one.hyper)

    @property
    def images(self) -> int:
        return self.config.hyper.batch // self.cluster.devices

    @property
    def weights(self) -> int:
        return 4 * parameter_count(self.config.network)

    def kept(self, *, shard: bool) -> float:
        """Weights, gradients, two moments, two averages, and the weights that layers multiply with."""
        return (7 * self.weights / self.cluster.devices + _largest_block(self)) if shard else 7 * self.weights

    @property
    def per_image(self) -> float:
        small = preset("img512-s").network
        return _ACTIVATIONS / _BATCH * activation_count(self.config.network) / activation_count(small)

    def at_a_time(self, *, shard: bool) -> int:
        """Images that fit at a time, in equal parts of the device's share; 0: none does."""
        room = 0.9 * self.cluster.memory - self.kept(shard=shard)
        parts = [n for n in range(1, self.images + 1) if self.images % n == 0 and n * self.per_image <= room]
        return max(parts, default=0)

    @property
    def computing(self) -> float:
        """Seconds of a step's products, at the rate of the measured one."""
        small = multiply_adds(preset("img512-s").network)
        rate = small * _BATCH / _STEP * self.cluster.speed
        return multiply_adds(self.config.network) * self.images / rate

    def sending(self, *, shard: bool) -> float:
        """Seconds of messages: the gradients' sum; with ``shard`` weights twice, gradients once."""
        of = self.cluster
        return 3 * of.all_gather(self.weights) if shard else of.all_reduce(self.weights)

    def hidden(self, *, shard: bool) -> float:
        """Seconds of computing beside which messages are sent: the backward pass, or all of it."""
        return self.computing if shard else self.computing * 2 / 3

    def step(self, *, shard: bool) -> float:
        return self.computing + max(0.0, self.sending(shard=shard) - self.hidden(shard=shard))

    @property
    def days(self) -> float:
        return self.config.hyper.duration / self.config.hyper.batch * self.step(shard=False) / 86400

    @property
    def stall(self) -> float:
        return state_bytes(self.config) / _COPY


def _largest_block(estimate: Estimate) -> float:
    return 2 * estimate.weights / len(estimate.config.network.channel_mult) / estimate.config.network.num_blocks


def computed() -> Iterator[str]:
    """Rows of the table."""
    for size in SIZES:
        for cluster in CLUSTERS:
            of = Estimate(size, cluster)
            modes = []
            for shard in (False, True):
                count = of.at_a_time(shard=shard)
                fits = f"{of.kept(shard=shard) / GiB:.1f} GiB" + (
                    f", {count} at a time" if count else ", no image fits"
                )
                late = max(0.0, of.sending(shard=shard) - of.hidden(shard=shard))
                hidden = "hidden" if not late else f"{late / of.step(shard=shard):.0%} of the step waits"
                modes.append(f"{fits} | {of.sending(shard=shard) * 1e3:.0f} ms, {hidden}")
            rate = of.config.hyper.batch / of.step(shard=False)
            cells = (size.upper(), cluster.name, of.images, *modes, f"{rate:,.0f}", f"{of.days:.1f}")
            yield f"| {' | '.join(map(str, cells))} |"


def stored() -> Iterator[str]:
    """Rows of what is stored."""
    for size in SIZES:
        of = Estimate(size, CLUSTERS[0])
        config = of.config.intervals_filled()
        state, snapshots = state_bytes(config), snapshot_count(config) * of.weights / 2
        every = (config.checkpoint or 1) / config.hyper.batch * of.step(shard=False)
        sizes = f"{of.weights / 4e6:.0f} M | {state / 1e9:.1f} GB | {state / 8e9:.2f} GB"
        yield f"| {size.upper()} | {sizes} | {of.stall:.1f} s | {of.stall / every:.2%} | {snapshots / 1e9:.0f} GB |"


# ---- checked here


def exchange(words: int) -> None:
    """Print the seconds of a sum over the processes of torchrun; the worker of :func:`checked`."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    data, times = torch.ones(words), []
    for _ in range(12):
        start = time.perf_counter()
        distributed.all_reduce(data)
        times.append(time.perf_counter() - start)
    if distributed.get_rank() == 0:
        print(median(times[2:]))
    distributed.destroy_process_group()


def launched(count: int, *words: object) -> str:
    """What ``count`` processes, each on one thread, print."""
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=29611")
    command = [sys.executable, *(torchrun if count > 1 else ()), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    return done.stdout


def rate(count: int, *options: object, batch: int = 128) -> tuple[float, list[float]]:
    """Images a second of a short run by ``count`` processes, and its losses."""
    words: tuple[object, ...]
    words = ("-m", "backends.torch.train", "--preset", "digits", "--channels", 64, "--batch", batch)
    words = (*words, "--duration", 40 * batch, "--status", 4 * batch, "--device", "cpu", "--no-picture")
    with tempfile.TemporaryDirectory() as folder:
        launched(count, *words, "--outdir", f"{folder}/run", *options)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    return median(line["images_per_s"] for line in lines[2:]), [line["loss"] for line in lines]


def checked() -> Iterator[str]:
    """Rows of predicted and measured rates on this machine's cores."""
    network: NetworkConfig = preset("digits").network
    cores, words = os.cpu_count() or 1, parameter_count(network)
    alone, losses = rate(1)
    each = 2 * (128 / alone - 64 / rate(1, batch=64)[0]) / 128  # seconds for another image
    fixed = 128 / alone - 128 * each
    yield f"| 1 | {alone:.0f} | | | | |"
    for count in (2, 4):
        sending = float(launched(count, "-m", "benchmarks.scale", "--exchange", words).split()[-1])
        computing = (fixed + 128 / count * each) * max(1, count / cores)
        predicted = 128 / (computing + sending)  # cores that compute cannot send meanwhile
        for options in ((), ("--shard",)):
            measured, theirs = rate(count, *options)
            far = max(abs(a - b) / abs(b) for a, b in zip(theirs, losses, strict=True))
            guess = f"{predicted:.0f} | {measured / predicted:.2f}" if not options else " | "
            name = f"{count}{', divided' * bool(options)}"
            yield f"| {name} | {measured:.0f} | {guess} | {sending * 1e3:.1f} ms | {far:.0e} |"


def main() -> None:
    if sys.argv[1:2] == ["--exchange"]:
        exchange(int(sys.argv[2]))
        return
    check = list(checked())
    text = f"""# Scale

Computed by `python -m benchmarks.scale`. **Nothing below was run on more than one GPU**: times follow from one
measured step ([performance](performance.md): S, 128 images, {_STEP * 1e3:.0f} ms on an H200), multiply-adds, bytes
and bandwidths. H100: 80 GB, NVLink 450 GB/s each way, 400 Gb/s between hosts of 8, by one port or by eight. v5p: 95
GB a chip, 300 GB/s each way, slower by the ratio of nominal peaks. All of one batch of 2048 images; messages in
float32.

Memory beside activations: weights, gradients, two moments, two averages and normalized weights, whole in each process
or divided (`--shard`; JAX always). "At a time": images whose activations fit as well; the rest of a share is
accumulated.

| size | devices | images each | whole: memory | messages | `--shard`: memory | messages | images/s | days |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(computed())}

Days are those of the paper's number of images, with whole weights. Not in the model: small shares compute less
efficiently (without compilation S takes 166 ms for 32 images and 284 ms for 128), and hosts differ.

## What is stored

A process copies and checks a state at {_COPY / 1e9:.0f} GB/s, as measured on a CPU for XS, then training goes on; the
share of each of 8 processes is written meanwhile.

| size | parameters | state | share of 8 | training stands still | of the time between states | snapshots, float16 |
|---|---|---|---|---|---|---|
{chr(10).join(stored())}

## Checked here

{machine()}; processes of one thread each, gloo, digits with 64 channels, a batch of 128. Predicted: the images of a
process as long as they take one alone, the work on the weights in each, more processes than cores in turns, and the
sum of the gradients. Loss: the largest relative difference to one process over 40 steps.

| processes | images/s | predicted | measured/predicted | sum of gradients | loss differs by |
|---|---|---|---|---|---|
{chr(10).join(check)}
"""
    print(text)
    (Path(__file__).parents[1] / "docs" / "scale.md").write_text(text)


if __name__ == "__main__":
    main()
