"""Cases of the PyTorch port beside plain PyTorch on one device: training step, forward pass, sampling, averages."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from backends.ports import sample
from backends.torch.compiling import FixedSizes, Graphs, Mode, made_ready
from backends.torch.denoiser import SamplingDenoiser
from backends.torch.network import Network, fold
from backends.torch.step import Batch, Learner
from backends.torch.weights import build
from benchmarks.plain_torch import PlainEDM2
from benchmarks.rounds import Row, in_turns
from edm2_core.network import NetworkConfig, initialize, multiply_adds

LR = 0.01
TOGETHER = 3
"""Steps from one wait for a GPU to the next, as in training, where the host runs ahead of it."""

initial = lru_cache(initialize)


@dataclass(frozen=True)
class Bench:
    """A network of both on ``device``: ours in ``dtype``, compiled in ``mode``; the plain one in ``plain_dtype``."""

    name: str
    config: NetworkConfig
    device: torch.device
    dtype: torch.dtype = torch.float32
    plain_dtype: torch.dtype = torch.float32
    mode: Mode | None = None

    @cached_property
    def network(self) -> Network:
        network = build(self.config, initial(self.config, seed=0), device=self.device, dtype=self.dtype)
        made_ready(network, self.device, self.mode)
        return network

    @cached_property
    def learner(self) -> Learner:
        return Learner(self.network, compiles=self.mode is not None)

    @cached_property
    def plain(self) -> PlainEDM2:
        return PlainEDM2(self.config, self.device, self.plain_dtype, initial(self.config, seed=0))

    @cached_property
    def sampled(self) -> SamplingDenoiser:
        """A network of its own, since folding keeps its weights."""
        network = build(self.config, initial(self.config, seed=0), device=self.device, dtype=self.dtype)
        made_ready(network, self.device, None)
        fold(network)
        denoiser = SamplingDenoiser(network)
        return replace(denoiser, answer=FixedSizes(Graphs(denoiser.denoised))) if self.on_cuda else denoiser

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def settle(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def batch(self, size: int, *, seed: int = 0) -> Batch:
        draw, config = torch.Generator().manual_seed(seed), self.config
        shape = (size, config.img_channels, *config.image_size)
        images, noise = (torch.randn(shape, generator=draw) for _ in range(2))
        sigma = torch.randn((size, 1, 1, 1), generator=draw).exp()
        labels = torch.eye(config.label_dim)[torch.arange(size) % config.label_dim] if config.label_dim else None
        images, noise, sigma = (x.to(self.device) for x in (images * 0.5, noise, sigma))
        return Batch(images, noise, sigma, None if labels is None else labels.to(self.device))

    def flops(self, images: int, evaluations: int = 1) -> float:
        """Of products, two for a multiply-add."""
        return 2.0 * multiply_adds(self.config) * images * evaluations


def first_step(bench: Bench, size: int) -> float:
    """Seconds to the end of the first step, initial weights and compilation included."""
    start = time.perf_counter()
    bench.learner.step(bench.batch(size), lr=LR)
    bench.settle()
    return time.perf_counter() - start


def step(bench: Bench, size: int, *, rounds: int, peak: float) -> Row:
    """A training step with two averages; the backward pass counts as two forward ones."""
    batch, together = bench.batch(size), TOGETHER if bench.on_cuda else 1
    memory = _peak_memory(bench, lambda: bench.learner.step(batch, lr=LR))
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: [bench.learner.step(batch, lr=LR) for _ in range(together)],
        "plain": lambda: [bench.plain.step(batch, lr=LR) for _ in range(together)],
    }
    times = in_turns(candidates, rounds=rounds, settle=bench.settle)
    seconds = {name: value / together for name, value in times.items()}
    notes = _of_peak(bench.flops(size, 3), seconds, peak) | {"images/s": f"{size / seconds['ours']:.0f}"}
    return Row(f"{bench.name}: step, batch {size}", seconds, notes | memory)


def forward(bench: Bench, size: int, *, rounds: int, peak: float) -> Row:
    """One evaluation, as in sampling."""
    batch = bench.batch(size)

    @torch.no_grad()
    def plain() -> Tensor:
        return bench.plain.denoised(batch.images, batch.sigma, batch.labels)[0]

    level = float(batch.sigma[0])
    candidates = {"ours": lambda: bench.sampled(batch.images, level, batch.labels), "plain": plain}
    seconds = in_turns(candidates, rounds=rounds, settle=bench.settle, warm=2)
    return Row(f"{bench.name}: forward, batch {size}", seconds, _of_peak(bench.flops(size), seconds, peak))


def sampling(bench: Bench, size: int, *, rounds: int, steps: int = 32, guidance: float = 1.0) -> Row:
    """2 ``steps`` - 1 evaluations; with guidance, by the same network without its label."""
    batch = bench.batch(size)

    def ours() -> object:
        joint = guidance != 1
        return sample(bench.sampled, batch.unit_noise, batch.labels, guidance=guidance, joint=joint, num_steps=steps)

    def plain() -> object:
        return bench.plain.sample(batch.unit_noise, batch.labels, guidance=guidance, num_steps=steps)

    seconds = in_turns({"ours": ours, "plain": plain}, rounds=rounds, settle=bench.settle)
    kind = "" if guidance == 1 else ", guided by itself"
    return Row(f"{bench.name}: {2 * steps - 1} evaluations{kind}, batch {size}", seconds)


def averages(bench: Bench, *, rounds: int, step_seconds: float) -> Row:
    """The update of two averages."""

    def ours() -> None:
        bench.learner.ema.update(time=bench.learner.nimg + 1, delta=1)

    def plain() -> None:
        bench.plain.nimg += 1
        bench.plain.update_averages(1)

    seconds = in_turns({"ours": ours, "plain": plain}, rounds=max(rounds, 10), settle=bench.settle)
    return Row(f"{bench.name}: two averages", seconds, {"of a step": f"{seconds['ours'] / step_seconds:.1%}"})


def losses(bench: Bench, size: int, *, steps: int = 200) -> Row:
    """Both train on the same batches from the same weights: the mean loss of the last quarter of the steps."""
    fresh = replace(bench)  # with weights of its own
    seconds, late = {"ours": 0.0, "plain": 0.0}, {"ours": 0.0, "plain": 0.0}
    for index in range(steps):
        batch = fresh.batch(size, seed=index)
        runs = {"ours": lambda: fresh.learner.step(batch, lr=LR)[0], "plain": lambda: fresh.plain.step(batch, lr=LR)}  # noqa: B023
        for name, run in runs.items():
            start = time.perf_counter()
            loss = float(run())
            seconds[name] += time.perf_counter() - start
            late[name] += loss / (steps // 4) if index >= steps - steps // 4 else 0.0
    notes = {f"loss, {name}": f"{loss:.5f}" for name, loss in late.items()}
    return Row(f"{bench.name}: {steps} steps, batch {size}", seconds, notes)


def growth(bench: Bench, sizes: tuple[int, ...], *, rounds: int) -> list[Row]:
    """Steps of several batches: a step's cost should grow with the batch, not faster."""
    rows = []
    for size in sizes:
        batch = bench.batch(size)
        seconds = in_turns({"ours": lambda: bench.learner.step(batch, lr=LR)}, rounds=rounds, settle=bench.settle)  # noqa: B023
        memory = _peak_memory(bench, lambda: bench.learner.step(batch, lr=LR))  # noqa: B023
        each = {"per image": f"{1e3 * seconds['ours'] / size:.2f} ms"}
        rows.append(Row(f"{bench.name}: step, batch {size}", seconds, each | memory))
    return rows


def product_peak(device: torch.device, dtype: torch.dtype, *, size: int = 4096, rounds: int = 7) -> float:
    """Floating-point operations a second of a product of square matrices, the best of ``rounds``."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(rounds + 1):
        settle()
        start = time.perf_counter()
        a @ b
        settle()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def _of_peak(flops: float, seconds: dict[str, float], peak: float) -> dict[str, str]:
    return {"of the product peak": f"{flops / seconds['ours'] / peak:.0%}"}


def _peak_memory(bench: Bench, run: Callable[[], object]) -> dict[str, str]:
    if not bench.on_cuda:
        return {}
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)  # of all networks and averages that are there
    run()
    bench.settle()
    taken = torch.cuda.max_memory_allocated(bench.device) - before
    return {"memory beside weights": f"{taken / 2**30:.1f} GiB"}
