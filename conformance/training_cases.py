"""Cases of training: gradients, whole runs, and states that pass from port to port (LOSS, STEP, EMA)."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st

from backends.pipeline.checkpoints import states
from conformance import measure, oracle, tolerance
from conformance import strategies as draw
from conformance.contract import PortCase
from conformance.network_cases import BACKWARD
from conformance.oracle import GRADIENT_SHARE, Params, trained_names
from conformance.ports import Subject
from conformance.strategies import wide
from edm2_core import mp, reference
from edm2_core.ema import Length
from edm2_core.network import NetworkConfig, plan
from edm2_core.state import State

GRADIENT = "4 x network + 4 eps x condition of the residual, tolerance.gradient"
ADAM = "rounding + lr x the gradient's error over the root of its second moment, tolerance.adam"


def loss(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    got, _ = port.loss_and_gradients(config, params, *batch.arrays)
    wanted = reference.loss(config, wide(params), *wide(tuple(batch)))
    allowed = tolerance.gradient(config, batch.sigma, batch.images)
    measure.close(got, wanted, allowed, what="the loss of each element", why=GRADIENT)


def directions(port: Subject, config: NetworkConfig, seed: int) -> None:
    """(g + error) . v - g . v is N(0, |error|^2) for Gaussian v: within 6 of its standard deviations. The central
    difference is accurate to tolerance.difference."""
    config = replace(config, clip_act=None)  # a difference across the kink of a clip is wrong
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed).with_a_dropped_label
    _, gradients = port.loss_and_gradients(config, params, *batch.arrays)
    measure.same_names(gradients, trained_names(config), what="the gradients")
    exact, allowed = wide(params), tolerance.gradient(config, batch.sigma, batch.images)

    def objective(direction: Params, h: float) -> float:
        moved = {name: value + h * direction.get(name, 0.0) for name, value in exact.items()}
        return float(np.sum(reference.loss(config, moved, *wide(tuple(batch))))) / len(batch.images)

    norm = sqrt(sum(float(np.sum(wide(g) ** 2)) for g in gradients.values()))
    rng, h = np.random.default_rng(seed), tolerance.STEP
    for _ in range(2):
        v = {name: rng.standard_normal(gradient.shape) for name, gradient in gradients.items()}
        along = sum(float(np.sum(wide(g) * v[name])) for name, g in gradients.items())
        up, down = objective(v, h), objective(v, -h)
        wanted = (up - down) / (2 * h)
        bound = 6 * allowed * norm + tolerance.difference(config) * max(abs(up), abs(down))
        why = f"6 standard deviations of |gradient| x ({GRADIENT}), and tolerance.difference of the loss"
        what = "the derivative of the loss along a random direction"
        measure.within(abs(along - wanted), bound, what=what, why=why, got=along, wanted=wanted)


def gradients(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed).with_a_dropped_label
    _, got = port.loss_and_gradients(config, params, *batch.arrays)
    _, wanted = oracle.torch_gradients(config, wide(params), batch)
    allowed = GRADIENT_SHARE * tolerance.gradient(config, batch.sigma, batch.images)
    why = f"{GRADIENT_SHARE} x ({GRADIENT}), of the tensors' root mean square at least"
    measure.close_all(got, wanted, allowed, what="the gradient", why=why, floor=tolerance.gradient_floor(wanted))


def training(
    port: Subject,
    config: NetworkConfig,
    seed: int,
    sizes: Sequence[int],
    betas: tuple[float, float],
    sigma_rels: tuple[float, ...],
) -> None:
    params = draw.random_parameters(config, seed)
    batches = [draw.random_batch(config, seed + i, size=size) for i, size in enumerate(sizes)]
    options: Any = {"learning_rates": (0.01, 0.02, 0.005, 0.01), "betas": betas, "sigma_rels": sigma_rels}
    losses, trained, averages = port.train(config, params, [batch.arrays for batch in batches], **options)
    wanted = oracle.train(config, params, batches, **options)
    measure.holds(len(losses) == len(sizes), "a loss for each step", got=len(losses), wanted=len(sizes))
    for step, (got, want, allowed) in enumerate(zip(losses, wanted.losses, wanted.loss_slack, strict=True)):
        what = f"the mean loss of step {step + 1}"
        measure.within(abs(got - want), allowed, what=what, why=GRADIENT, got=float(got), wanted=want)
    measure.same_names(averages, sigma_rels, what="the averages by length")
    pairs = {"weights": (trained, wanted.weights, wanted.weight_slack)}
    pairs |= {f"average {s}": (averages[s], wanted.averages[s], wanted.average_slack[s]) for s in sigma_rels}
    for part, (arrays, wants, slack) in pairs.items():
        measure.same_names(arrays, wants, what=part)
        for name, array in wants.items():  # each step rounds the weight, and forcing rounds it a few times more
            rounding = len(sizes) * 8 * tolerance.eps("float32") * float(np.linalg.norm(array.ravel()))
            allowed = rounding + float(np.linalg.norm(slack.get(name, np.zeros(1)).ravel()))
            off = float(np.linalg.norm((arrays[name] - array).ravel()))
            measure.within(off, allowed, what=f"{name} of the {part} after {len(sizes)} steps", why=ADAM)


def first_step(port: Subject, config: NetworkConfig, seed: int) -> None:
    """Each weight moves by at most lr; averages equal the weights and Fourier constants stay, bit for bit."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    options: Any = {"betas": (0.9, 0.99), "sigma_rels": (0.05, 0.10)}
    _, trained, averages = port.train(config, params, [batch.arrays], learning_rates=[0.01], **options)
    for s, average in averages.items():
        for name in params:
            same = np.array_equal(average[name], trained[name])
            measure.holds(same, f"average {s} must be the weights after the first step, {name} is not")
    for name, parameter in plan(config).parameters.items():
        if not parameter.trained:
            measure.holds(np.array_equal(trained[name], params[name]), f"{name} must stay as it is")
            continue
        start = mp.force_weight_norm(wide(params[name])) if parameter.normalized else params[name]
        moved = float(np.abs(trained[name] - start).max())
        bound = 0.01 + 16 * tolerance.eps("float32") * float(np.abs(start).max())
        measure.holds(moved <= bound, f"the first step must move {name} by lr at most", got=moved, wanted=bound)


LENGTHS = (Length.of(0.05), Length.of(0.10))


def _state(config: NetworkConfig, seed: int) -> State:
    """A state whose parts all differ."""
    params, names = draw.random_parameters(config, seed), trained_names(config)
    constants = {name: params[name] for name in params if name not in names}
    first, second = (draw.random_parameters(config, seed + i) for i in (1, 2))
    averages = {length: draw.random_parameters(config, seed + i) | constants for i, length in enumerate(LENGTHS, 3)}
    return State(
        params=params,
        moments1={name: np.asarray(first[name] * np.float32(0.01)) for name in names},
        moments2={name: np.asarray(np.square(second[name]) * np.float32(1e-4)) for name in names},
        averages=averages,
        nimg=32,
        steps=16,
    )


def state_file(port: Subject, config: NetworkConfig, seed: int) -> None:
    """A state written, read, passed through the port and written again is the same file. If each port returns it
    unchanged, it can pass between any two."""
    before = _state(config, seed)
    with TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        states.save_state(first, before)
        _, after = port.advance(config, states.load_state(first, config, LENGTHS), [], learning_rates=[])
        states.save_state(second, after)
        same = first.read_bytes() == second.read_bytes()
    returned = states.parts(after)
    changed = [f"{part}/{name}" for part, arrays in states.parts(before).items() for name, array in arrays.items()
               if not np.array_equal(array, returned.get(part, {}).get(name, np.nan))]  # fmt: skip
    got = f"{', '.join(changed[:3]) or 'counters'} changed"
    measure.holds(same, "a state file must come back from the port byte for byte", got=got, wanted="the same bytes")


def resuming(port: Subject, config: NetworkConfig, seed: int, stop: int) -> None:
    """Four steps equal ``stop`` steps, a state in NumPy arrays, and the remaining steps, bit for bit."""
    start = _state(config, seed)
    batches = [draw.random_batch(config, seed + i).arrays for i in range(4)]
    rates = [0.01, 0.02, 0.005, 0.01]
    losses, whole = port.advance(config, start, batches, learning_rates=rates)
    before, between = port.advance(config, start, batches[:stop], learning_rates=rates[:stop])
    after, end = port.advance(config, between, batches[stop:], learning_rates=rates[stop:])
    measure.holds([*before, *after] == list(losses), "losses after resuming", got=[*before, *after], wanted=losses)
    counters = (end.nimg, end.steps)
    measure.holds(counters == (whole.nimg, whole.steps) == (40, 20), "nimg, steps", got=counters, wanted=(40, 20))
    resumed = states.parts(end)
    for part, arrays in states.parts(whole).items():
        measure.same_names(resumed[part], arrays, what=part)
        for name, array in arrays.items():
            same = np.array_equal(resumed[part][name], array)
            measure.holds(same, f"{part}/{name} must be as without stopping")


SIZES = {"sizes": st.just((2, 3, 1, 2))}
ADAMS = {
    "betas": st.sampled_from([(0.9, 0.99), (0.8, 0.95)]), "sigma_rels": st.sampled_from([(0.05, 0.10), (0.2,)]),
}  # fmt: skip
AUTOGRAD = "edm2_core.reference on float64 tensors, differentiated by PyTorch"
TRAINING = f"the step written out in float64, over {AUTOGRAD}"

CASES = (
    PortCase(
        "loss", ("LOSS-3",), BACKWARD, loss, "edm2_core.reference on float64 NumPy", GRADIENT,
        "loss_and_gradients", cost=2,
    ),
    PortCase(
        "gradient-along-directions", ("STEP-1", "LOSS-3"), BACKWARD, directions,
        "central differences of edm2_core.reference", f"6 standard deviations of {GRADIENT}", "loss_and_gradients",
        cost=2,
    ),
    PortCase("gradients", ("STEP-1",), BACKWARD, gradients, AUTOGRAD, GRADIENT, "loss_and_gradients", cost=2),
    PortCase("first-step", ("STEP-3",), BACKWARD, first_step, "lr, and equality", "exact", "train", cost=4),
    PortCase(
        "training", ("STEP-2", "STEP-3", "EMA-3"), BACKWARD | SIZES | ADAMS, training, TRAINING, ADAM, "train",
        cost=5,
    ),
    PortCase(
        "state-file", ("STEP-4",), BACKWARD, state_file, "the bytes themselves", "exact", "advance", cost=5
    ),
    PortCase(
        "resuming", ("STEP-4",), BACKWARD | {"stop": st.integers(1, 3)}, resuming, "the port, without stopping",
        "exact", "advance", cost=10,
    ),
)  # fmt: skip
