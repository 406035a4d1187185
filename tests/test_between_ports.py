"""Any two installed ports: states and snapshots pass between them unchanged, and seeds give the same images."""

from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import permutations

import numpy as np
import pytest
from toy_port import train

from backends.pipeline.checkpoints.snapshots import Snapshot, load_snapshot, save_snapshot
from backends.pipeline.checkpoints.states import load_state, save_state
from backends.pipeline.data import seeds
from backends.pipeline.data.labels import one_hot
from backends.pipeline.runs.pictures import visible
from conformance import ports
from conformance import strategies as draw
from conformance.oracle import trained_names
from edm2_core.codec import DataFormat
from edm2_core.ema import Length
from edm2_core.state import State

CONFIG = draw.FEW_CONFIGS[0]
LENGTHS = (Length.of(0.05), Length.of(0.10))
HERE, _ = ports.available()
PAIRS = [pytest.param(*pair, id="-".join(pair)) for pair in permutations(HERE, 2)]
each_pair = pytest.mark.parametrize(
    ("one", "other"), PAIRS or [pytest.param("", "", marks=pytest.mark.skip(reason="fewer than two ports"))]
)


def fresh() -> State:
    params = draw.random_parameters(CONFIG, 0, max_gain=1.0)
    return State.start(params, trained=trained_names(CONFIG), lengths=LENGTHS)


@cache
def trained(name: str) -> State:
    """After two steps of that port."""
    batches = [draw.random_batch(CONFIG, seed) for seed in (1, 2)]
    return HERE[name].advance(CONFIG, fresh(), batches, learning_rates=[0.01, 0.01])[1]


def through(name: str, state: State) -> State:
    """What that port gives back of what it took in."""
    return HERE[name].advance(CONFIG, state, [], learning_rates=[])[1]


@each_pair
def test_a_state_crosses(one, other, tmp_path):
    save_state(tmp_path / "one", trained(one))
    save_state(tmp_path / "other", through(other, load_state(tmp_path / "one", CONFIG, LENGTHS)))
    assert (tmp_path / "other").read_bytes() == (tmp_path / "one").read_bytes()


@each_pair
def test_a_snapshot_crosses(one, other, tmp_path):
    def snapshot(params):
        return Snapshot(params=params, config=CONFIG, nimg=4, length=LENGTHS[1])

    save_snapshot(tmp_path / "one", snapshot(trained(one).averages[LENGTHS[1]]))
    params = load_snapshot(tmp_path / "one").params
    kept = through(other, replace(fresh(), params=params, averages=dict.fromkeys(LENGTHS, params)))
    for returned in (kept.params, kept.averages[LENGTHS[1]]):
        save_snapshot(tmp_path / "other", snapshot(returned))
        assert (tmp_path / "other").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_run_goes_on_in_any_port(toy):
    named = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
    trainers = [getattr(import_module(f"backends.{name}.trainer"), named[name]) for name in HERE if name in named]
    for i, trainer in enumerate(trainers + trainers[:1]):
        assert train(trainer, "crossed", 64 * (i + 1)).steps == i + 1


@cache
def images(name: str) -> np.ndarray:
    """Four seeds of a network that no port has trained, as 8-bit pixels."""
    chosen, condition = range(4), draw.random_batch(CONFIG, 0, size=4).condition
    labels = one_hot(seeds.labels(chosen, CONFIG.label_dim), CONFIG.label_dim)
    noise = seeds.noise(chosen, (CONFIG.img_channels, *CONFIG.image_size))
    samples = HERE[name].sample(CONFIG, fresh().params, noise, labels, condition=condition, num_steps=6)
    return visible(samples, DataFormat())


@each_pair
def test_seeds_are_the_same_images(one, other):
    """Float32 is closer than a level by far, so that pixels differ where rounding falls on two sides of one."""
    assert np.abs(images(one).astype(int) - images(other)).max() <= 1
    assert np.ptp(images(one)) > 16  # of something
