"""The JAX port: its network against the reference, its step however divided, its commands as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from socket import socket

import numpy as np
import pytest

from backends.pipeline.datasets import open_dataset
from backends.pipeline.options import TrainOptions
from backends.pipeline.settings import resolve
from backends.pipeline.state import load_state
from conformance import oracle, tolerance
from conformance import strategies as draw
from edm2_core import reference
from edm2_core.errors import InputError
from edm2_core.ladder import RUNGS
from edm2_core.network import NetworkConfig
from edm2_core.presets import preset

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

from backends.jax import network, weights  # noqa: E402
from backends.jax.port import PORT  # noqa: E402
from backends.jax.step import Batch, force_weight_norm, init, make_step, to_stored  # noqa: E402

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
LADDER = {
    rung: NetworkConfig(
        img_resolution=4, img_channels=2, label_dim=3, model_channels=6, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(2,), channels_per_head=6, channels_per_group=6, resample_filter=(1, 3, 3, 1),
        concat_balance=0.3, logvar_channels=5, ladder=rung,
    )
    for rung in RUNGS
}  # fmt: skip
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TRAIN, SAMPLE = ("-m", "backends.jax.train"), ("-m", "backends.jax.sample")
SMALL = ("--duration", "384", "--batch", "64", "--snapshot", "1000", "--status", "128", "--checkpoint", "1Ki")


def arguments(config):
    batch = draw.random_batch(config, 3, size=4)
    return draw.random_parameters(config, 1), batch


@pytest.mark.parametrize("config", (CONFIGS | LADDER).values(), ids=CONFIGS | LADDER)
def test_the_network_is_the_reference(config):
    params, batch = arguments(config)
    got = PORT.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    wanted = reference.denoise(config, draw.wide(params), *draw.wide((batch.noisy, batch.sigma, batch.labels)))
    for g, w in zip(got, wanted, strict=True):
        assert tolerance.relative(g, w) < 4 * tolerance.network(config)


def test_gradients_in_the_middle_of_the_ladder_are_the_references():
    """Compiling takes longest, and the suite has networks of either end."""
    config = LADDER["C"]
    params, batch = draw.random_parameters(config, 1), draw.random_batch(config, 3)
    loss, got = PORT.loss_and_gradients(config, params, *batch)
    losses, wanted = oracle.torch_gradients(config, params, batch)
    allowed = tolerance.gradient(config, batch.sigma, batch.images)
    assert tolerance.relative(loss, losses) < allowed
    floor = tolerance.gradient_floor(wanted)
    assert tolerance.relative_all(got, wanted, floor)[0] < oracle.GRADIENT_SHARE * allowed


@pytest.mark.parametrize("rung", ["D", "E"])
def test_weights_are_forced_onto_their_spheres_from_config_e_on(rung):
    native = weights.load(LADDER[rung], draw.random_parameters(LADDER[rung], 1))
    forced = force_weight_norm(LADDER[rung], native)
    moved = {name for name in native if not np.array_equal(forced[name], native[name])}
    assert moved == ({name for name in native if name.endswith(".weight")} if rung == "E" else set())


@each_config
def test_jit_changes_no_more_than_rounding(config):
    params, batch = arguments(config)
    compiled, _ = PORT.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    with jax.default_matmul_precision("highest"):
        native = weights.load(config, params)
        plain, _ = network.denoise(config, native, weights.to_nhwc(batch.noisy), batch.sigma, batch.labels)
    assert tolerance.relative(compiled, weights.to_nchw(plain)) < tolerance.network(config)


@each_config
def test_the_derivative_along_a_direction_is_a_finite_difference(config):
    """In float64 arithmetic of the difference; forward mode in float32."""
    params, batch = arguments(config)
    native = weights.load(config, params)
    direction = np.random.default_rng(0).standard_normal(batch.noisy.shape).astype(np.float32)

    def run(x):
        return network.denoise(config, native, x, batch.sigma, batch.labels)[0]

    with jax.default_matmul_precision("highest"):
        _, got = jax.jvp(run, (weights.to_nhwc(batch.noisy),), (weights.to_nhwc(direction),))
    h = 1e-6
    sides = (
        reference.denoise(
            config,
            draw.wide(params),
            batch.noisy + s * h * direction.astype(np.float64),
            *draw.wide((batch.sigma, batch.labels)),
        )[0]
        for s in (1, -1)
    )
    wanted = np.subtract(*sides) / (2 * h)
    assert tolerance.relative(weights.to_nchw(got), wanted) < 1e-4


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 5)])
def test_the_kernels_gradient_is_that_of_a_convolution_however_it_is_computed(kernel):
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((2, 6, 5, c)).astype(np.float32) for c in (3, 4))
    w = rng.standard_normal((*kernel, 3, 4)).astype(np.float32)

    def plain(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(convolution):
        return jax.grad(lambda x, w: (convolution(x, w) * g).sum(), argnums=(0, 1))(x, w)

    for got, wanted in zip(gradients(network.convolution), gradients(plain), strict=True):
        assert tolerance.relative(got, wanted) < 4 * tolerance.eps("float32") * tolerance.reduction(2 * 6 * 5 * 4)
    each = jax.vmap(jax.grad(lambda x, w: network.convolution(x[None], w).sum(), argnums=1), (0, None))(x, w)
    assert each.shape == (2, *w.shape)  # gradients of each image, too
    assert tolerance.relative(network.by_products(x, w), plain(x, w)) < 1e-5


def test_layouts_go_there_and_back():
    for shape in ((), (5,), (3, 4), (2, 3, 5, 7)):
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        native = weights.to_native(array)
        assert native.shape[-1:] == shape[:1] or len(shape) < 2
        assert np.array_equal(weights.to_canonical(native), array)


def one_step(config, params, batch, **options):
    step = jax.jit(make_step(config, **options))
    state = init(config, params, sigma_rels=(0.05,))
    native = Batch(weights.to_nhwc(batch.images), weights.to_nhwc(batch.unit_noise), batch.sigma, batch.labels)
    state, metrics = step(state, native, np.float32(0.01), jax.random.key(0))
    return to_stored(state), metrics


def test_accumulated_gradients_are_those_of_the_whole_batch():
    config = CONFIGS["attention, labels, filter"]
    params, batch = arguments(config)
    whole, _ = one_step(config, params, batch)
    parts, _ = one_step(config, params, batch, microbatch=2)
    for name, array in whole.moments1.items():
        assert np.allclose(parts.moments1[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max() + 1e-7)


def test_gradients_that_are_not_finite_are_zeroed_and_counted():
    config = CONFIGS["plain"]
    params, batch = arguments(config)
    images = batch.images.copy()
    images[0, 0, 0, 0] = np.inf
    stored, metrics = one_step(config, params, batch._replace(images=images))
    assert int(metrics.nonfinite) > 0
    assert all(np.isfinite(array).all() for array in stored.params.values())


def test_half_precision_keeps_parameters_in_float32_and_comes_near():
    config = CONFIGS["plain"]
    params, batch = arguments(config)
    half, metrics = one_step(config, params, batch, dtype=jax.numpy.bfloat16)
    full, exact = one_step(config, params, batch)
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=0.05)
    assert all(array.dtype == np.float32 for array in half.params.values())
    assert full.params.keys() == half.params.keys()


def test_64_bit_numbers_stay_off():
    assert not jax.config.jax_enable_x64


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Commands keep what they compile: most train the same network, and compiling takes longest."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield folder


def run(*args, cwd, status=0, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A short run, as far as it goes without stopping."""
    folder = tmp_path_factory.mktemp("short")
    done = run(*TRAIN, *SMALL, "--outdir", "whole", cwd=folder)
    assert "first step after" in done.stderr
    return folder


def state_of(run_folder):
    return load_state(run_folder / "state" / "state.safetensors", preset("digits").network, (0.05, 0.10))


def samples(cwd, command, *args):
    run(*command, *args, "--format", "npz", "--outdir", "out", cwd=cwd)
    with np.load(cwd / "out" / "samples.npz") as file:
        return dict(file)


def test_what_is_compiled_is_kept_where_that_is_asked_for(short, cache):
    kept = {path.name for path in cache.iterdir()}
    assert any("train_step" in name for name in kept)
    run(*TRAIN, *SMALL, "--outdir", "again", cwd=short)
    assert {path.name for path in cache.iterdir() if "train_step" in path.name} <= kept


def test_resuming_is_not_stopping(short):
    run(*TRAIN, *SMALL, "--duration", "192", "--outdir", "parts", cwd=short)
    assert "resumed" in run(*TRAIN, "--outdir", "parts", "--duration", "384", cwd=short).stdout
    paths = (short / name / "state" / "state.safetensors" for name in ("whole", "parts"))
    assert len({path.read_bytes() for path in paths}) == 1


def test_eight_devices_do_as_one(short):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = run(*TRAIN, *SMALL, "--outdir", "eight", cwd=short, **flags)
    assert "8 x cpu" in done.stdout
    one, eight = state_of(short / "whole"), state_of(short / "eight")
    # six steps of Adam, each of which moves a weight by lr at most, whatever the rounding of its gradient
    assert tolerance.relative_all(eight.params, one.params, 1.0)[0] < 1e-4
    done = run(*TRAIN, *SMALL, "--batch", "60", "--outdir", "odd", cwd=short, status=2, **flags)
    assert "divisible by the number of devices, got 60 for 8" in done.stderr
    run(*TRAIN, "--outdir", "eight", "--duration", "512", cwd=short)  # a state of eight devices loads on one


def test_two_processes_do_as_one(short):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, *TRAIN, *SMALL, "--outdir", "two"]
    both = [
        subprocess.Popen(command, cwd=short, env={**environment, "JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    one, two = state_of(short / "whole"), state_of(short / "two")
    assert tolerance.relative_all(two.params, one.params, 1.0)[0] < 1e-4


def test_processes_that_cannot_meet_are_one_line(short):
    done = run(*TRAIN, cwd=short, status=2, JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="none")
    assert done.stderr.startswith("error: processes must meet at JAX_COORDINATOR_ADDRESS 127.0.0.1:1")


def test_too_little_memory_names_the_batch_to_try(monkeypatch):
    """Where the device says so; a CPU's memory is never said to be exhausted."""
    from backends.jax import trainer as room

    def exhausted(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    dataset, options, line = open_dataset("digits"), TrainOptions(batch=64), r"must fit.*try --batch-per-device 32"
    images, labels = np.zeros((64, 1, 8, 8), np.float32), np.zeros((64, 10), np.float32)
    monkeypatch.setattr(room, "compiled", lambda *shapes, cpu: exhausted)
    trainer = room.JaxTrainer(resolve(options, dataset), options)
    with pytest.raises(InputError, match=line):
        trainer.step(images, labels, nimg=0, lr=0.01)
    monkeypatch.setattr(room, "compiled", exhausted)
    with pytest.raises(InputError, match=line):
        room.JaxTrainer(resolve(options, dataset), options)


def test_snapshots_and_states_cross_between_ports(short):
    pytest.importorskip("torch", reason="torch is not installed")
    options = ("--run", "whole", "--seeds", "0-7", "--steps", 6)
    ours, theirs = samples(short, SAMPLE, *options), samples(short, ("-m", "backends.torch.sample"), *options)
    assert np.abs(ours["images"].astype(int) - theirs["images"]).max() <= 1
    run(*TRAIN, *SMALL, "--duration", "192", "--outdir", "crossed", cwd=short)
    run("-m", "backends.torch.train", "--outdir", "crossed", "--duration", "384", cwd=short)
    run(*TRAIN, "--outdir", "crossed", "--duration", "512", cwd=short)
    assert state_of(short / "crossed").nimg == 512


def test_other_precision_dropout_and_guidance_run(short):
    run(
        *TRAIN,
        *SMALL,
        "--precision",
        "bfloat16",
        "--dropout",
        "0.1",
        "--batch-per-device",
        16,
        "--outdir",
        "b",
        cwd=short,
    )
    log = [json.loads(line) for line in (short / "b" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["loss"]) for record in log)
    assert len(samples(short, SAMPLE, "--run", "b", "--seeds", "0-2", "--steps", 3, "--guidance", 2)["images"]) == 3


def test_a_device_that_is_not_here_is_one_line(short):
    done = run(*TRAIN, "--device", "tpu", cwd=short, status=2)
    assert done.stderr.startswith("error: --device must be one that is here (cpu")
    assert Path(short / "runs").exists() is False
