"""Traditional averages in every port: trained, resumed, stored, sampled, and other lengths made from them."""

import re
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from toy_port import CONFIG, ToySampler, ToyTrainer, config_of, options_of, run_toy

from backends.commands.cli import main as edm2
from backends.pipeline.checkpoints.snapshots import load_snapshot
from backends.pipeline.checkpoints.states import load_state, parts, save_state
from backends.pipeline.data.batches import Batch
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.options import SampleOptions
from backends.pipeline.runs.sampling import run_sampling
from backends.ports import Machine
from edm2_core.ema import Length, coefficients
from edm2_core.errors import InputError
from edm2_core.network import initialize, plan
from edm2_core.state import State

PROG = "python -m backends.toy.train"
PORTS = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
LIFE = Length.half_life(700)


pytestmark = pytest.mark.usefixtures("toy")


@cache
def trainer_of(port):
    """One for all tests: compiling takes longest."""
    config = replace(config_of(preset="digits", half_life=700, batch=64), network=CONFIG)
    return getattr(import_module(f"backends.{port}.trainer"), PORTS[port])(config, Machine())


def step(trainer):
    images = np.random.default_rng(trainer.nimg).integers(256, size=(64, 1, 8, 8), dtype=np.uint8)
    trainer.step(trainer.place(Batch(images, np.arange(64) % 10)), lr=0.01)
    return trainer.state()


def stored(state):
    """``state`` as it comes back from its file."""
    save_state(Path("state.safetensors"), state)
    return load_state(Path("state.safetensors"), CONFIG, (LIFE,))


def train(outdir, trainer=ToyTrainer, **options):
    options = {"preset": "toy", "data": "digits", "half_life": 700} | options
    sampler = ToySampler()
    assert run_toy(trainer, sampler, prog=PROG, outdir=outdir, **options) == 0
    return Run(outdir), sampler


@pytest.mark.parametrize("port", PORTS)
def test_a_port_tracks_it_and_goes_on_as_if_it_had_not_stopped(port):
    pytest.importorskip(port, reason=f"{port} is not installed")
    trainer, states = trainer_of(port), []
    trained = [name for name, parameter in plan(CONFIG).parameters.items() if parameter.trained]
    trainer.load_state(State.start(initialize(CONFIG, seed=0), trained=trained, lengths=[LIFE]))
    for _ in range(4):
        states.append(stored(step(trainer)))
    name = "unet.out_conv.weight"
    average = states[0].params[name].astype(np.float64)
    for count, state in enumerate(states, 1):
        keep = LIFE.beta(t_next=64 * count, t_delta=64)
        average = keep * average + (1 - keep) * state.params[name]
        # float32: an update rounds its result, and its share by a few eps
        bound = 8 * count * 2.0**-23 * np.abs(average).max()
        assert np.allclose(state.averages[LIFE][name], average, rtol=0, atol=bound)
    assert not np.array_equal(states[1].averages[LIFE][name], states[1].params[name])
    trainer.load_state(states[1])
    step(trainer)
    again = parts(stored(step(trainer)))
    for prefix, arrays in parts(states[3]).items():
        assert all(np.array_equal(again[prefix][name], array) for name, array in arrays.items()), prefix


def test_its_state_crosses_between_ports():
    for port in PORTS:
        pytest.importorskip(port, reason=f"{port} is not installed")
    before, name = stored(step(trainer_of("torch"))), "unet.out_conv.weight"
    for port in ("jax", "mlx", "torch"):
        trainer = trainer_of(port)
        trainer.load_state(before)
        assert same(trainer.average(LIFE), before.averages[LIFE])
        after = stored(step(trainer))
        keep = LIFE.beta(t_next=after.nimg, t_delta=64)
        wanted = keep * before.averages[LIFE][name] + (1 - keep) * after.params[name]
        assert np.allclose(after.averages[LIFE][name], wanted, rtol=0, atol=1e-6)
        before = after


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_run_stores_it_as_what_it_is():
    run, _ = train("run", snapshot=1000)
    assert [path.name for path in sorted(run.snapshots_path.iterdir())][:2] == [
        "0000001-h0.7.safetensors",
        "0000002-h0.7.safetensors",
    ]
    last = run.snapshots(CONFIG)[-1]
    assert (last.time, last.length) == (4096, LIFE)
    assert load_snapshot(last.path).length == LIFE


@pytest.mark.parametrize(("half_life", "rows"), [(700, 5), (5, 2)], ids=["of some length", "too short"])
def test_its_picture_has_rows_for_it_and_for_what_it_can_be_made_into(half_life, rows):
    run, sampler = train("run", half_life=half_life)
    means = [call["mean"] for call in sampler.calls if call["n"] == 10]
    kept = load_snapshot(run.snapshots(CONFIG)[-1].path).params["unet.out_conv.weight"]
    assert len(means) == rows  # raw, stored, and 0.10, 0.15, 0.20 or none
    assert means[1] == pytest.approx(float(kept.mean()))


def test_sampling_takes_it_by_default_and_rebuilds_other_lengths(capsys):
    run, _ = train("run", snapshot=1000)
    sampler = ToySampler()
    run_sampling(options_of(SampleOptions, run=run.path, seeds="0"), sampler, prog=PROG)
    sources = run.snapshots(CONFIG)
    weights = [source.load().params["unet.out_conv.weight"] for source in sources]
    assert sampler.calls[-1]["mean"] == pytest.approx(float(weights[-1].mean()))
    assert "(stored): 0.01 M parameters, half-life 700, after 4096 images" in capsys.readouterr().out
    assert (run.samples_path / "0000004-h0.7" / "grid.png").exists()

    run_sampling(options_of(SampleOptions, run=run.path, seeds="0", sigma_rel=0.1), sampler, prog=PROG)
    times = [source.time for source in sources]
    factors = coefficients(in_time=times, in_sigma_rel=[LIFE] * len(times), out_time=times[-1], out_sigma_rel=[0.1])
    wanted = sum(float(f) * w.astype(np.float64) for f, w in zip(factors[:, 0], weights, strict=True))
    assert sampler.calls[-1]["mean"] == pytest.approx(wanted.mean(), abs=1e-6)
    assert f"reconstructed from {len(sources)} snapshots" in capsys.readouterr().out


def test_edm2_reconstruct_needs_to_be_told_nothing(capsys):
    run, _ = train("run", snapshot=1000)
    assert edm2(["reconstruct", str(run.path), "--sigma-rels", "0.1"]) == 0
    (made,) = (run.path / "reconstructed").glob("*.safetensors")
    assert load_snapshot(made).length == Length.of(0.1)
    assert "profile error" in capsys.readouterr().out


def test_averages_of_both_kinds_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"^--half-life and --sigma-rels exclude each other, got both: .*$"):
        train("run", sigma_rels=(0.1,))
    assert not Path("run").exists()


def test_torch_trains_config_a_resumes_samples_and_is_rebuilt_from(capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    options = {"trainer": import_module("backends.torch.trainer").TorchTrainer, "ladder": "A", "batch": 64}
    options |= {"snapshot": 1000, "status": 512}
    whole, _ = train("whole", **options, duration=2048)
    assert re.search(r"sample --run \S*whole\n", capsys.readouterr().out)  # the length that there is
    network = whole.config().network
    train("parts", **options, duration=1024)
    assert run_toy(options["trainer"], ToySampler(), outdir="parts", duration=2048) == 0
    assert [source.length for source in whole.snapshots(network)] == [LIFE, LIFE]
    for path in (*whole.state_path.iterdir(), *(source.path for source in whole.snapshots(network))):
        assert (Path("parts") / path.relative_to(whole.path)).read_bytes() == path.read_bytes()
    sampler = import_module("backends.torch.port").Port(device="cpu").sampler
    for sigma_rel, origin in ((None, "stored"), (0.2, "reconstructed from 2 snapshots, predicted error 10.2%")):
        capsys.readouterr()
        asked = {"run": whole.path, "seeds": "0-3", "steps": 2} | ({"sigma_rel": sigma_rel} if sigma_rel else {})
        run_sampling(options_of(SampleOptions, **asked), sampler, prog=PROG)
        assert f"whole ({origin})" in capsys.readouterr().out
    assert edm2(["reconstruct", "whole", "--sigma-rels", "0.2"]) == 0
    assert [path.name for path in Path("whole/reconstructed").iterdir()] == ["0000002-0.200.safetensors"]
