"""What the train command prints: the network and the data, how long it will take, and what to do next."""

import sys
import time
from collections.abc import Callable

from backends.trainer import Trainer
from edm2_core.ema import TimedPlan
from edm2_core.ladder import LADDER
from edm2_core.network import NetworkConfig, multiply_adds, parameter_count
from edm2_core.presets import AUTO

from .command_line import count_text
from .config import TrainConfig
from .folder import Run
from .initial import Initial

_MANY_EPOCHS = 10_000  # the paper's longest run on ImageNet has 1757


def say_begin(run: Run, config: TrainConfig, trainer: Trainer, *, resumed: bool) -> None:
    network, hyper, data = config.network, config.hyper, config.data_summary
    cost = f"{parameter_count(network) / 1e6:.2f} M parameters, {2 * multiply_adds(network) / 1e9:.3g} GFLOP per image"
    count = f"{data.count} images" if data is not None else "images"
    size = f"{network.image_size[1]}x{network.image_size[0]}x{network.img_channels}"
    print(f"device   {trainer.device}" + (f", {trainer.world} processes" if trainer.world > 1 else ""))
    print(f"network  {config.preset}, {ladder_text(network)}: {cost}, {config.precision}")
    if config.preset == AUTO:
        print(f"auto     what no option names, such as --channels or --duration, is chosen for {count}")
    print(f"data     {config.data}: {count} of {size}, {_labels_text(config)}")
    if network.cond_channels:
        print(f"         each with a condition of {network.cond_channels} channels from {config.condition}")
    if config.holdout:
        print(f"         {config.holdout:.3g} of them held out: the loss on these is logged")
    print(f"run      {run.path}: {count_text(hyper.duration)} images in batches of {hyper.batch}")
    say_epochs(config)
    if config.telemetry and not trainer.measures:
        print("note     no telemetry, which needs whole weights in each process: --shard divides them")
    if trainer.nimg:
        print(f"resumed  {run.state_path} at {trainer.nimg} images")
    elif resumed:
        print("resumed  at 0 images, because no state was stored yet")
    sys.stdout.flush()  # before the progress on stderr


def say_initial(config: TrainConfig, begin: Initial) -> None:
    taken = len(begin.params) - len(begin.fresh)
    print(f"start    {taken} of {len(begin.params)} arrays from {config.init}")
    for what, names in (("fresh", begin.fresh), ("unused", begin.unused)):
        if names:
            print(f"         {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    sys.stdout.flush()


def _labels_text(config: TrainConfig) -> str:
    dim, summary = config.network.label_dim, config.data_summary
    if not dim:
        return "no labels"
    if summary is not None and summary.vectors:
        return f"label vectors of length {dim}"
    names = config.format.classes
    shown = f" ({', '.join(names[:3])}{', ...' if dim > 3 else ''})" if names and names[0] != "0" else ""
    return f"{dim} classes{shown}"


def say_epochs(config: TrainConfig) -> None:
    if config.data_summary is None:
        return
    epochs = config.hyper.duration / config.data_summary.count
    print(f"epochs   {epochs:,.1f}" if epochs < 100 else f"epochs   {epochs:,.0f}")
    if epochs > _MANY_EPOCHS:
        print(f"note     {epochs:,.0f} epochs are far more than any data needs: choose a shorter --duration")


def ladder_text(network: NetworkConfig) -> str:
    """The rung, and the switches that differ from it."""
    rung, switches = vars(LADDER[network.ladder]), vars(network.switches)
    differ = [f"{name} {switches[name]}" for name in rung if switches[name] != rung[name]]
    return f"CONFIG {network.ladder}" + (f" with {', '.join(differ)}" if differ else "")


def say_next(run: Run, config: TrainConfig, *, prog: str) -> None:
    sample = f"{prog.removesuffix('train')}sample --run {run.address}"
    print("next, for example:")
    other = any(length.relative for length in config.hyper.lengths)  # a half-life alone reconstructs few lengths
    print(f"  {sample} --sigma-rel 0.15" if other else f"  {sample}")
    if config.network.label_dim and not (config.data_summary and config.data_summary.vectors):
        print(f"  {sample} --class 3" + " --guidance 2" * (config.network.label_dropout > 0))
    if not isinstance(config.snapshot_plan, TimedPlan):  # a timed plan ends with its run
        print(f"  {prog} --outdir {run.address} --duration {count_text(2 * config.hyper.duration)}")


class Estimate:
    """Says how long the run will take, by a few of its steps; the first ones, which may compile, do not count."""

    _FIRST, _LAST = 2, 5

    def __init__(self, trainer: Trainer, duration: int, say: Callable[[str], object]) -> None:
        self._trainer, self._duration, self._say = trainer, duration, say
        self._steps, self._since, self._nimg = 0, 0.0, 0

    def __call__(self, *, nimg: int) -> None:
        """To be called before each step."""
        if self._steps in (self._FIRST, self._LAST):
            self._trainer.settle()
        if self._steps == self._FIRST:
            self._since, self._nimg = time.monotonic(), nimg
        elif self._steps == self._LAST:
            rate = (nimg - self._nimg) / max(time.monotonic() - self._since, 1e-9)
            seconds = (self._duration - nimg) / rate
            self._say(f"time     about {_duration_text(seconds)} at {rate:.3g} images/s, as the first steps took")
        self._steps += 1


def _duration_text(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
