"""The MLX port: its network against the reference, its step however divided, its commands as a person runs them."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_port import train

from backends.pipeline.checkpoints.states import parts
from backends.pipeline.runs.folder import Run
from conformance import network_cases, tolerance, training_cases
from conformance import strategies as draw
from edm2_core import reference
from edm2_core.errors import InputError
from edm2_core.ladder import RUNGS
from edm2_core.network import NetworkConfig, initialize, plan

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from mlx import nn  # noqa: E402

from backends.mlx import convolution, step, weights  # noqa: E402
from backends.mlx import device as devices  # noqa: E402
from backends.mlx import network as networks  # noqa: E402
from backends.mlx.port import PORT, Port  # noqa: E402
from backends.mlx.trainer import MLXTrainer  # noqa: E402

CONFIGS = {
    "plain": NetworkConfig(
        img_resolution=8, img_channels=1, model_channels=6, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(),
        channels_per_head=6, logvar_channels=5,
    ),
    "attention, labels, filter": NetworkConfig(
        img_resolution=12, img_channels=3, label_dim=4, model_channels=10, channel_mult=(1, 1.5, 2), num_blocks=1,
        attn_resolutions=(6, 3), channels_per_head=5, resample_filter=(1, 3, 3, 1), clip_act=2.0, logvar_channels=5,
        concat_balance=0.3, sigma_data=1.0,
    ),
}  # fmt: skip
SMALL = NetworkConfig(
    img_resolution=4, img_channels=1, label_dim=3, model_channels=4, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), channels_per_head=4, logvar_channels=4,
)  # fmt: skip
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TRAIN, SAMPLE = ("-m", "backends.mlx.train"), ("-m", "backends.mlx.sample")


def arguments(config, size=4):
    return draw.random_parameters(config, 1), draw.random_batch(config, 3, size=size)


def native(batch):
    return step.Batch(*(None if array is None else weights.to_native(array) for array in batch))


def trained(config, params, batch, *, steps=1, dtype=mx.float32, key=None, **options):
    learner = step.Learner(weights.build(config, params, dtype=dtype), **options)
    keys = None if key is None else mx.random.split(key, len(batch[0]))
    metrics = [learner.step(native(batch), lr=0.01, dropout=keys) for _ in range(steps)]
    return learner, metrics[-1]


def test_recomputed_activations_give_the_same_gradients(monkeypatch):
    """Each block is checkpointed where that is asked for."""
    params, batch = arguments(SMALL)
    results, blocks, plain = [], [], nn.utils.checkpoint
    monkeypatch.setattr(nn.utils, "checkpoint", lambda block, run: blocks.append(block) or plain(block, run))
    for recomputes in (False, True):
        network = weights.build(SMALL, params)
        network.unet.recomputes = recomputes
        results.append(step.gradients_of(network, native(batch), scale=0.1)[1])
    for name, array in results[0].items():
        assert tolerance.relative(np.array(results[1][name]), np.array(array)) < tolerance.network(SMALL)
    walk = plan(SMALL)
    assert len(blocks) == sum(block.role != "conv" for block in (*walk.encoder, *walk.decoder))


# ---- the network


@each_config
def test_the_network_is_the_reference(config):
    params, batch = arguments(config)
    got = PORT.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    wanted = reference.denoise(config, draw.wide(params), *draw.wide((batch.noisy, batch.sigma, batch.labels)))
    for g, w in zip(got, wanted, strict=True):
        assert tolerance.relative(g, w) < tolerance.network(config)


@pytest.mark.parametrize(
    "switches",
    [*({"ladder": rung} for rung in RUNGS), {"ladder": "A", "mp_functions": True, "gains": True}],
    ids=[*RUNGS, "A, biases in G's sums"],
)
def test_every_rung_is_the_reference(switches):
    """Its images, its gradients, and which weights a step forces onto their spheres."""
    pytest.importorskip("torch", reason="the oracle of gradients differentiates with torch, which is not installed")
    config = replace(CONFIGS["attention, labels, filter"], channels_per_group=5, **switches)
    network_cases.denoise(PORT, config, 1)
    training_cases.gradients(PORT, config, 1)
    training_cases.first_step(PORT, config, 1)


@each_config
def test_the_derivative_along_a_direction_is_a_finite_difference(config):
    """In float64 arithmetic of the difference; forward mode in float32."""
    params, batch = arguments(config)
    direction = np.random.default_rng(0).standard_normal(batch.noisy.shape).astype(np.float32)
    with mx.stream(mx.cpu):
        network, given = weights.build(config, params), native(batch)
        inputs = [weights.to_native(array) for array in (batch.noisy, direction)]
        _, (got,) = mx.jvp(lambda x: network(x, given.sigma, given.labels)[0], inputs[:1], inputs[1:])
    h, exact = 1e-6, draw.wide((params, batch.noisy, batch.sigma, batch.labels))
    ahead, behind = (reference.denoise(config, exact[0], exact[1] + s * direction, *exact[2:])[0] for s in (h, -h))
    assert tolerance.relative(weights.to_canonical(got), (ahead - behind) / (2 * h)) < 1e-4


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("images", [1, 5])
def test_both_ways_to_convolve_are_one(size, images, monkeypatch):
    monkeypatch.setattr(convolution, "_WORTH_A_CORE", 1)  # so that the cores share it
    x, w = mx.random.normal((images, 6, 5, 3), key=mx.random.key(0)), mx.random.normal((4, size, size, 3))

    def squared(convolve):
        return lambda x, w: mx.square(convolve(x, w)).sum()

    def library(x, w):
        return mx.conv2d(x, w, padding=size // 2)

    for way in (lambda f: [f(x, w)], lambda f: mx.grad(squared(f), argnums=(0, 1))(x, w)):
        for got, wanted in zip(way(convolution.by_taps), way(library), strict=True):
            assert tolerance.relative(got, wanted) < 27 * tolerance.eps("float32")


def test_layouts_go_there_and_back_once():
    for shape in ((), (5,), (3, 4), (2, 3, 3, 3), (2, 5, 3, 3)):
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        there = weights.to_native(array)
        assert there.shape == ((shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape)
        assert weights.to_native(there) is there
        back = weights.to_canonical(there)
        assert np.array_equal(back, array)
        assert back.flags.c_contiguous
        assert weights.to_canonical(back) is back


def test_parameters_have_the_canonical_names_and_fourier_constants_are_not_trained():
    config = CONFIGS["attention, labels, filter"]
    network = weights.build(config, initialize(config, seed=0))
    table = plan(config).parameters
    assert weights.tensors(network).keys() == table.keys()
    gradients = step.gradients_of(network, native(arguments(config)[1]), scale=1.0)[1]
    assert gradients.keys() == {name for name, parameter in table.items() if parameter.trained}


# ---- the step


def test_accumulated_gradients_are_those_of_the_whole_batch():
    config = CONFIGS["attention, labels, filter"]
    whole, parts = (trained(config, *arguments(config), microbatch=m)[0].state() for m in (None, 3))
    for name, array in whole.moments1.items():
        assert np.allclose(parts.moments1[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max() + 1e-7)


def test_weights_are_normalized_once_for_all_parts_of_a_batch(monkeypatch):
    """Parts of 1 and of 2 images call for the same number of normalizations of weights; afterwards all is as stored."""
    config, counts = CONFIGS["attention, labels, filter"], []
    whole = networks.normalize

    def counted(x, axes, **options):
        counts[-1] += axes in ((1,), (1, 2, 3))
        return whole(x, axes, **options)

    for module in (networks, step):
        monkeypatch.setattr(module, "normalize", counted)
    for size in (1, 2):
        counts.append(0)
        learner, _ = trained(config, *arguments(config), microbatch=size)
    assert counts[0] == counts[1] > 0
    layers = [layer for layer in learner.network.modules() if isinstance(layer, networks.Layer)]
    assert all(layer.normalized for layer in layers)


def test_loss_scaling_changes_nothing_in_float32():
    params, batch = arguments(SMALL)
    plain, scaled = (trained(SMALL, params, batch, loss_scaling=s)[0].state().params for s in (1.0, 1024.0))
    assert all(np.array_equal(plain[name], scaled[name]) for name in plain)  # a power of two


@pytest.mark.parametrize("value", [np.inf, 1e16])  # the second's gradients are finite, and their squares are not
def test_gradients_that_are_not_finite_are_zeroed_and_counted(value):
    params, batch = arguments(SMALL)
    images = batch.images.copy()
    images[0, 0, 0, 0] = value
    batch = batch._replace(images=images)
    learner, (_, nonfinite) = trained(SMALL, params, batch)
    assert int(nonfinite) > 0
    stored = learner.state()
    assert all(np.isfinite(array).all() for part in (stored.params, stored.moments2) for array in part.values())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_half_precision_keeps_parameters_in_float32_and_comes_near(dtype):
    params, batch = arguments(SMALL)
    half, (loss, _) = trained(SMALL, params, batch, dtype=dtype)
    _, (exact, _) = trained(SMALL, params, batch)
    assert float(loss) == pytest.approx(float(exact), rel=20 * mx.finfo(dtype).eps)
    assert {array.dtype for array in weights.tensors(half.network).values()} == {mx.float32}
    assert {a.dtype for average in half.ema.averages.values() for a in average.values()} == {mx.float32}


def test_dropout_is_a_function_of_its_key_and_acts_in_training_only():
    config = replace(SMALL, dropout=0.5)
    params, batch = arguments(config)
    losses = [float(trained(config, params, batch, key=k and mx.random.key(k))[1][0]) for k in (1, 1, 2, None)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert losses[3] == float(trained(SMALL, params, batch)[1][0])


def test_state_goes_on_exactly():
    params, batch = arguments(SMALL)
    whole, _ = trained(SMALL, params, batch, steps=4)
    resumed, _ = trained(SMALL, draw.random_parameters(SMALL, 2), batch)
    resumed.load_state(trained(SMALL, params, batch, steps=2)[0].state())
    for _ in range(2):
        resumed.step(native(batch), lr=0.01)
    ours, theirs = resumed.state(), whole.state()
    assert (ours.nimg, ours.steps) == (theirs.nimg, theirs.steps)
    for part, arrays in parts(theirs).items():
        assert all(np.array_equal(parts(ours)[part][name], array) for name, array in arrays.items()), part


@pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU, compiled functions need g++")
def test_compiled_with_its_state_a_step_is_the_same(monkeypatch):
    """All but the gradients, which take minutes where g++ compiles every kernel."""
    params, batch = arguments(SMALL)
    plain, _ = trained(SMALL, params, batch, steps=3)
    gradients = {"inputs"}
    monkeypatch.setattr(step, "compiled", lambda f, **state: f if state.keys() == gradients else mx.compile(f, **state))
    compiled, _ = trained(SMALL, params, batch, steps=3)
    for part, arrays in parts(plain.state()).items():
        assert tolerance.relative_all(parts(compiled.state())[part], arrays, 1e-3)[0] < 1e-4, part


def test_memory_stays_flat():
    params, batch = arguments(SMALL, size=2)
    learner, _ = trained(SMALL, params, batch, steps=2)
    taken = []
    for _ in range(2):
        mx.reset_peak_memory()
        for _ in range(100):
            learner.step(native(batch), lr=0.01)
        taken.append((mx.get_active_memory(), mx.get_peak_memory()))
    assert all(later <= 1.01 * earlier for earlier, later in zip(*taken, strict=True))


# ---- runs


def test_resuming_is_not_stopping(toy):
    for name, duration in (("whole", 192), ("parts", 128), ("parts", 192)):
        train(MLXTrainer, name, duration)
    shards = [path for name in ("whole", "parts") for path in Run(toy / name).state_path.glob("*.safetensors")]
    assert len(shards) == 2
    assert shards[0].read_bytes() == shards[1].read_bytes()


def launch(script, *, timeout=300, cwd):
    """``script`` in two processes, over loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1] - 1  # two in a row are wanted
    command = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    command += ["-n", "2", "--backend", "ring", "--starting-port", port, "--", sys.executable, "-c", script]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "EDM2_TIMEOUT": str(timeout)}
    return subprocess.run(map(str, command), cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


def test_two_processes_train_what_one_does(toy):
    script = """
from toy_port import PRESET, PRESETS, train_only
from backends.mlx import device as devices
from backends.mlx.trainer import MLXTrainer
PRESETS["toy"] = PRESET
devices._BUCKET = 1000
options = dict(preset="toy", data="digits", batch_per_device=16, dropout=0.1, label_dropout=0.1)
train_only(MLXTrainer, "two", 1280, **options)
"""
    done = launch(script, cwd=toy)
    assert "2 processes" in done.stdout, done.stdout + done.stderr
    one, two = train(MLXTrainer, "one", 1280, dropout=0.1, label_dropout=0.1), train(MLXTrainer, "two", 1280)
    assert two.nimg == one.nimg
    # to the rounding of sums in another order, which Adam carries on
    assert tolerance.relative_all(two.params, one.params, 1.0)[0] < 1e-4
    losses = [[line["loss"] for line in Run(toy / run).log()] for run in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("end", ["time.sleep(60)", "os._exit(0)"], ids=["silent", "gone"])
def test_a_process_that_waits_for_another_in_vain_says_so(tmp_path, end):
    script = f"""
import os, sys, time
from backends.mlx.device import Processes
from backends.pipeline.runs.exit_codes import command
@command
def main():
    here = Processes.here()
    here.mean(1.0)
    if here.rank == 1:
        {end}
    here.mean(1.0)
sys.exit(main())
"""
    start = time.monotonic()
    done = launch(script, timeout=2, cwd=tmp_path)
    assert re.search("error: (processes must meet within 2 s|all processes must stay)", done.stdout + done.stderr)
    assert time.monotonic() - start < 50


# ---- bad input


def command(*args, cwd, status=2):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_without_a_run_the_shipped_network_makes_the_picture(tmp_path):
    done = command(*SAMPLE, "--seeds", "0-1", "--steps", "2", cwd=tmp_path, status=0)
    assert "the network that ships with edm2" in done.stdout
    assert list(tmp_path.glob("samples*/grid.png"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((*TRAIN, "--device", "tpu"), r"--device must be one that is here \(.*cpu\), got tpu"),
        ((*TRAIN, "--precision", "float64"), "--precision must be one of float32, bfloat16, float16, got 'float64'"),
        ((*TRAIN, "--batch", 100, "--batch-per-device", 64), "--batch must be divisible.*100 and 64"),
        ((*TRAIN, "--data", "nowhere"), "nowhere"),
        ((*SAMPLE, "--net", "absent.safetensors"), "absent.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, args, says):
    done = command(*args, cwd=tmp_path)
    assert re.fullmatch(f"error: .*{says}.*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_float64_is_refused_before_the_gpu_is_asked():
    with pytest.raises(InputError, match="precision must be one of float32, bfloat16, float16, got float64"):
        Port(precision="float64")


@pytest.mark.parametrize(
    ("system", "machine", "fault", "says"),
    [
        ("Linux", "x86_64", "ModuleNotFoundError('', name='mlx')", r"pip install 'edm2\[mlx\]' \(mlx\[cpu\]"),
        ("Linux", "x86_64", "ImportError('libmlx.so: cannot open')", r"pip install 'edm2\[mlx\]' \(mlx\[cpu\]"),
        ("Darwin", "arm64", "ModuleNotFoundError('', name='mlx')", r"pip install 'edm2\[mlx\]'\n"),
        ("Windows", "AMD64", "ModuleNotFoundError('', name='mlx')", "MLX does not support Windows on AMD64"),
    ],
)
def test_where_mlx_is_missing_one_line_says_how_to_install_it(tmp_path, system, machine, fault, says):
    script = f"""
import platform, sys
platform.system, platform.machine = lambda: {system!r}, lambda: {machine!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlx":
            raise {fault}
sys.meta_path.insert(0, Absent())
from backends.mlx.train import main
sys.exit(main([]))
"""
    done = command("-c", script, cwd=tmp_path)
    assert re.fullmatch(f"error: this command needs mlx, which is not installed: {says}.*", done.stderr, re.DOTALL)
    assert done.stderr.count("\n") == 1


def test_what_is_said_of_the_device_is_here():
    said = devices.describe(devices.choose(None))
    assert re.fullmatch(r"(gpu|cpu) \(.*, memory limit \d+\.\d GiB\)", said)
