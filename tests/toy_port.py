"""A port small enough to see through: what looks like training depends on every input and nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from backends.pipeline.checkpoints.states import State, load_state
from backends.pipeline.runs.options import TrainOptions
from backends.pipeline.runs.training import run_training
from edm2_core.ema import beta
from edm2_core.network import NetworkConfig, initialize, plan
from edm2_core.presets import PRESETS

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
PRESET = replace(PRESETS["digits"], network=CONFIG, duration=4096, batch=64, snapshot=1024, rampup=512, decay=20)


class ToyTrainer:
    """Moves each weight along the sine of itself and of the batch; keeps real averages."""

    device = "numpy"

    def __init__(self, settings, options, *, rank=0, world=1):
        self.rank, self.world, self.batch, self.precision = rank, world, settings.batch, settings.precision
        params = initialize(settings.network, seed=settings.seed)
        trained = [name for name, parameter in plan(settings.network).parameters.items() if parameter.trained]
        zeros = {name: np.zeros_like(params[name]) for name in trained}
        averages = {sigma_rel: dict(params) for sigma_rel in settings.lengths}
        self.load_state(State(params=params, moments1=zeros, moments2=zeros, averages=averages, nimg=0, steps=0))
        self.seen, self.losses, self.rates, self.resumed = [], [], [], False

    def step(self, images, labels, /, *, nimg, lr):
        classes = 0 if labels is None else labels.argmax(1).sum()
        share = np.float32(images.sum() + classes)
        for name, first in self.moments1.items():
            gradient = np.sin(self.params[name] + share)
            self.moments1[name] = np.asarray(0.9 * first + 0.1 * gradient, np.float32)
            self.moments2[name] = np.asarray(0.99 * self.moments2[name] + 0.01 * gradient**2, np.float32)
            self.params[name] = np.asarray(self.params[name] - lr * self.moments1[name], np.float32)
        for sigma_rel, average in self.kept.items():
            keep = beta(sigma_rel, t_next=nimg + self.batch, t_delta=self.batch)
            for name in average:
                average[name] = np.asarray(keep * average[name] + (1 - keep) * self.params[name], np.float32)
        self.nimg, self.steps = nimg + self.batch, self.steps + 1
        self.seen.append((nimg, images.shape, None if labels is None else labels.shape))
        self.rates.append(lr)
        self.losses.append(float(share))

    def metrics(self):
        loss = float(np.mean(self.losses)) if self.losses else float("nan")
        self.losses = []
        return {"loss": loss, "nonfinite": 0}

    def parameters(self):
        return self.params

    def averages(self):
        return self.kept

    def state(self):
        return State(
            params=self.params,
            moments1=self.moments1,
            moments2=self.moments2,
            averages=self.kept,
            nimg=self.nimg,
            steps=self.steps,
        )

    def load_state(self, state, /):
        self.params, self.moments1, self.moments2 = dict(state.params), dict(state.moments1), dict(state.moments2)
        self.kept = {sigma_rel: dict(average) for sigma_rel, average in state.averages.items()}
        self.nimg, self.steps, self.resumed = state.nimg, state.steps, True

    def agree(self, stop, /):
        return stop


class ToySampler:
    """Images that depend on noise, labels, network and guide, row by row. Keeps what it was called with."""

    calls: list

    def __init__(self):
        self.calls = []

    def __call__(self, config, params, *, guide=None):
        mean = float(np.mean(params["unet.out_conv.weight"]))

        def sample(noise, labels=None, **settings):
            self.calls.append({"n": len(noise), "labels": labels, "guide": guide, "mean": mean, **settings})
            hue = 0 if labels is None else labels.argmax(1)[:, None, None, None] / 10
            churn = 0
            if settings.get("S_churn"):
                churn = sum(0.1 * array for array, _ in zip(settings["churn_noise"], range(3), strict=False))
            return np.tanh(noise + churn + mean).astype(np.float32) * 0.8 + np.float32(0.1) * hue

        return sample


def train(trainer, outdir, duration, **options):
    """The state that ``trainer`` leaves on the toy's network, in a run that is new or goes on."""
    if not Path(outdir).exists():
        options |= {"preset": "toy", "data": "digits"}
    options |= {"outdir": Path(outdir), "duration": duration}
    assert run_training(TrainOptions(**options), trainer, ToySampler(), prog="python -m backends.toy.train") == 0
    return load_state(Path(outdir) / "state" / "state.safetensors", CONFIG, (0.05, 0.10))
