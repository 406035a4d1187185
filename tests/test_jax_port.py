"""The JAX port: its network against the reference, its step however divided, its commands as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from socket import socket

import numpy as np
import pytest
from toy_port import config_of, train

from backends.pipeline.data import batches as data
from backends.pipeline.runs.folder import Run
from backends.ports import Machine
from conformance import oracle, tolerance
from conformance import strategies as draw
from edm2_core import reference
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.ladder import RUNGS
from edm2_core.network import NetworkConfig, initialize, plan

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

from backends.jax import convolution, device, network, weights  # noqa: E402
from backends.jax.port import PORT  # noqa: E402
from backends.jax.step import (  # noqa: E402
    Batch,
    force_weight_norm,
    init,
    make_network_step,
    to_state,
)
from backends.jax.trainer import JaxTrainer  # noqa: E402

LADDER = {
    rung: NetworkConfig(
        img_resolution=4, img_channels=2, label_dim=3, model_channels=6, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(2,), channels_per_head=6, channels_per_group=6, resample_filter=(1, 3, 3, 1),
        concat_balance=0.3, logvar_channels=5, ladder=rung,
    )
    for rung in RUNGS
}  # fmt: skip
TRAIN = ("-m", "backends.jax.train")
LENGTHS = ("--duration", "384", "--batch", "64", "--snapshot", "1000", "--status", "128", "--checkpoint", "1Ki")
SMALL = (*LENGTHS, "--telemetry", "0")


def arguments(config):
    batch = draw.random_batch(config, 3, size=4)
    return draw.random_parameters(config, 1), batch


@pytest.mark.parametrize("config", LADDER.values(), ids=LADDER)
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
    losses, wanted = oracle.torch_gradients(config, draw.wide(params), batch)
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


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 5)])
def test_the_kernels_gradient_is_that_of_a_convolution_however_it_is_computed(kernel):
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((2, 6, 5, c)).astype(np.float32) for c in (3, 4))
    w = rng.standard_normal((*kernel, 3, 4)).astype(np.float32)

    def plain(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(function):
        return jax.grad(lambda x, w: (function(x, w) * g).sum(), argnums=(0, 1))(x, w)

    for got, wanted in zip(gradients(convolution.convolution), gradients(plain), strict=True):
        assert tolerance.relative(got, wanted) < 4 * tolerance.eps("float32") * tolerance.reduction(2 * 6 * 5 * 4)
    each = jax.vmap(jax.grad(lambda x, w: convolution.convolution(x[None], w).sum(), argnums=1), (0, None))(x, w)
    assert each.shape == (2, *w.shape)  # gradients of each image, too
    assert tolerance.relative(convolution.by_products(x, w), plain(x, w)) < 1e-5


def test_layouts_go_there_and_back():
    for shape in ((), (5,), (3, 4), (2, 3, 5, 7)):
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        native = weights.to_native(array)
        assert native.shape[-1:] == shape[:1] or len(shape) < 2
        assert np.array_equal(weights.to_canonical(native), array)


@pytest.mark.parametrize("rung", ["B", "G"])
def test_activations_are_returned_under_jit_at_every_call(rung):
    """One for each weight of the U-Net, the same at both calls; the result is that without them."""
    config = LADDER[rung]
    params, batch = weights.init_params(config, seed=0), draw.random_batch(config, 3)
    x = weights.to_nhwc(batch.noisy)
    compiled = jax.jit(lambda params, x: network.denoise_with_activations(config, params, x, batch.sigma, batch.labels))
    first, second = compiled(params, x), compiled(params, x)
    names = {n for n, p in plan(config).parameters.items() if p.kind == "weight" and n.startswith("unet.")}
    assert first[2].keys() == names
    assert all(np.array_equal(second[2][name], array) for name, array in first[2].items())
    assert all(np.ptp(array) > 0 for name, array in first[2].items() if not weight_or_gain_is_0(config, params, name))
    for got, wanted in zip(first, network.denoise(config, params, x, batch.sigma, batch.labels), strict=False):
        assert tolerance.relative(got, wanted) < tolerance.network(config)


def weight_or_gain_is_0(config, params, name):
    gains = ("emb_linear.weight", "out_conv.weight") if config.switches.gains else ()
    return name.endswith(gains) or not np.any(params[name])


def test_gradients_flow_through_activations():
    """What blocks collect is a result like any other."""
    config = LADDER["G"]
    params, batch = weights.init_params(config, seed=0), draw.random_batch(config, 3)
    name = "unet.enc.4x4_block0.conv_res0.weight"

    def size(params):
        _, _, activations = network.denoise_with_activations(config, params, weights.to_nhwc(batch.noisy), batch.sigma)
        return (activations[name] ** 2).sum()

    gradients = jax.jit(jax.grad(size))(params)
    later = "unet.dec.4x4_block0.conv_res0.weight"
    assert np.any(gradients["unet.enc.4x4_conv.weight"])
    assert not np.any(gradients[later])


def one_step(config, params, batch, **options):
    step = jax.jit(make_network_step(config, sigma_rels=(0.05,), **options))
    native = Batch(weights.to_nhwc(batch.images), weights.to_nhwc(batch.unit_noise), batch.sigma, batch.labels)
    state, metrics = step(init(config, params, sigma_rels=(0.05,)), native, jax.random.key(0), lr=np.float32(0.01))
    return to_state(state), metrics


def test_recomputed_activations_give_the_same_step():
    """Each block, and nothing else, is recomputed where that is asked for."""
    config = LADDER["G"]
    params, batch = arguments(config)
    x = weights.to_nhwc(batch.noisy)
    for recomputes, blocks in ((True, len(plan(config).encoder + plan(config).decoder)), (False, 0)):
        denoise = network.network_denoiser(config, "float32", recomputes)
        traced = jax.make_jaxpr(denoise)(weights.load(config, params), x, batch.sigma, batch.labels)
        assert sum(equation.primitive.name in ("checkpoint", "remat2") for equation in traced.eqns) == blocks
    plain, _ = one_step(config, params, batch)
    recomputed, _ = one_step(config, params, batch, recomputes=True)
    for name, array in plain.moments1.items():
        assert np.allclose(recomputed.moments1[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max() + 1e-7)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    config = LADDER["G"]
    params, batch = arguments(config)
    whole, _ = one_step(config, params, batch)
    parts, _ = one_step(config, params, batch, microbatch=2)
    for name, array in whole.moments1.items():
        assert np.allclose(parts.moments1[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max() + 1e-7)


@pytest.mark.parametrize("value", [np.inf, 1e16])  # the second's gradients are finite, and their squares are not
def test_gradients_that_are_not_finite_are_zeroed_and_counted(value):
    config = LADDER["G"]
    params, batch = arguments(config)
    images = batch.images.copy()
    images[0, 0, 0, 0] = value
    stored, metrics = one_step(config, params, batch._replace(images=images))
    assert int(metrics.nonfinite) > 0
    assert all(np.isfinite(array).all() for part in (stored.params, stored.moments2) for array in part.values())


def test_half_precision_keeps_parameters_in_float32_and_comes_near():
    config = LADDER["G"]
    params, batch = arguments(config)
    half, metrics = one_step(config, params, batch, dtype=jax.numpy.bfloat16)
    full, exact = one_step(config, params, batch)
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=0.05)
    assert all(array.dtype == np.float32 for array in half.params.values())
    assert full.params.keys() == half.params.keys()


def test_64_bit_numbers_stay_off():
    assert not jax.config.jax_enable_x64


def run(*args, cwd, status=0, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_what_is_compiled_is_kept_where_that_is_asked_for(tmp_path):
    def kept():
        return {path.name for path in (tmp_path / "cache").iterdir() if "train_step" in path.name}

    tiny = ("--channels", 8, "--channels-per-head", 8, "--channel-mult", 1, "--blocks", 1, "--attention", 0)
    for outdir in ("first", "second"):
        done = run(
            *TRAIN,
            *SMALL,
            *tiny,
            "--no-picture",
            "--outdir",
            outdir,
            cwd=tmp_path,
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"),
        )
        assert "first step after" in done.stderr
        assert len(kept()) == 1


def test_resuming_is_not_stopping(toy):
    for name, duration in (("whole", 192), ("parts", 128), ("parts", 192)):
        train(JaxTrainer, name, duration)
    shards = [path for name in ("whole", "parts") for path in Run(toy / name).state_path.glob("*.safetensors")]
    assert len(shards) == 2
    assert shards[0].read_bytes() == shards[1].read_bytes()


SCRIPT = """
from toy_port import PRESET, PRESETS, train_only
from backends.jax import device
from backends.jax.trainer import JaxTrainer
PRESETS["toy"] = PRESET
device.join()
options = dict(preset="toy", data="digits", dropout=0.1, label_dropout=0.1, batch_per_device={parts})
train_only(JaxTrainer, "{name}", 1280, **options)
"""


def train_elsewhere(name, *, parts, **environment):
    """A run of 20 steps on the toy's network, begun in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", SCRIPT.format(name=name, parts=parts)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_as_one(toy, name):
    """Weights and losses of 20 steps, dropout included, to the rounding of sums in another order, which Adam carries
    on."""
    one = train(JaxTrainer, "one", 1280, dropout=0.1, label_dropout=0.1)
    other = train(JaxTrainer, name, 1280)
    assert other.nimg == one.nimg
    assert tolerance.relative_all(other.params, one.params, 1.0)[0] < 1e-4
    losses = [[line["loss"] for line in Run(toy / run).log()] for run in ("one", name)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


EIGHT = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}


def test_eight_devices_do_as_one(toy):
    said, _ = train_elsewhere("eight", parts=4, **EIGHT).communicate(timeout=300)
    assert "8 x cpu" in said
    check_as_one(toy, "eight")
    assert train(JaxTrainer, "eight", 1344).nimg == 1344  # a state of eight devices loads on one


def test_a_batch_must_be_divisible_among_devices(tmp_path):
    done = run(*TRAIN, "--batch", "60", cwd=tmp_path, status=2, **EIGHT)
    assert "divisible by the number of devices, got 60 for 8" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_do_as_one(toy):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [train_elsewhere("two", parts=32, **where, JAX_PROCESS_ID=str(i)) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    check_as_one(toy, "two")


def test_processes_that_cannot_meet_are_one_line(tmp_path):
    done = run(*TRAIN, cwd=tmp_path, status=2, JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="none")
    assert done.stderr.startswith("error: processes must meet at JAX_COORDINATOR_ADDRESS 127.0.0.1:1")


def test_too_little_memory_names_the_batch_to_try(monkeypatch):
    """Where the device reports it; a CPU never does."""
    from backends.jax import trainer as room

    def exhausted(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    config, line = config_of(batch=64), r"must fit.*try --batch-per-device 32"
    batch = data.Batch(np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int64))
    monkeypatch.setattr(room, "compiled", lambda *shapes, platform: exhausted)
    trainer = room.JaxTrainer(config, Machine())
    with pytest.raises(InputError, match=line):
        trainer.step(trainer.place(batch), lr=0.01)
    monkeypatch.setattr(room.jax, "device_get", exhausted)  # on a GPU, where the step ends
    trainer._metrics, trainer._images = [(0, 0)], 64
    with pytest.raises(InputError, match=line):
        trainer.metrics()
    monkeypatch.setattr(room, "compiled", exhausted)
    with pytest.raises(InputError, match=line):
        room.JaxTrainer(config, Machine())


def test_only_what_is_asked_for_is_gathered_array_by_array(toy, monkeypatch):
    """Bytes: an average or the weights, those of one network; a state, four times as many: the weights, Adam's two
    moments, and the one average that this run keeps. No array is larger than the largest weight."""
    config = config_of(preset="toy", data="digits", sigma_rels=(0.10,))
    trainer, sizes, gather = JaxTrainer(config, Machine()), [], device.gathered

    def counted(array):
        sizes.append(np.asarray(array).nbytes)
        return gather(array)

    def gathered(ask):
        sizes.clear()
        ask()
        return sum(sizes)

    monkeypatch.setattr(weights, "gathered", counted)
    params = {name: array.nbytes for name, array in initialize(config.network, seed=0).items()}
    assert gathered(trainer.parameters) == sum(params.values())
    assert gathered(lambda: trainer.average(Length.of(0.10))) == sum(params.values())
    assert len(sizes) == len(params)
    assert max(sizes) == max(params.values())
    constants = sum(
        params[name] for name, parameter in plan(config.network).parameters.items() if not parameter.trained
    )
    assert gathered(trainer.state) == 4 * sum(params.values()) - 3 * constants
    name = "unet.out_conv.weight"
    assert gathered(lambda: trainer.state([name])) == 4 * params[name]


def test_other_precision_dropout_and_parts_of_a_batch_run(toy):
    train(JaxTrainer, "b", 192, precision="bfloat16", dropout=0.1, batch_per_device=16, status=64)
    log = [json.loads(line) for line in (toy / "b" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert all(np.isfinite(record["loss"]) for record in log)


def test_a_device_that_is_not_here_is_one_line(tmp_path):
    done = run(*TRAIN, "--device", "tpu", cwd=tmp_path, status=2)
    assert done.stderr.startswith("error: --device must be one that is here (cpu")
    assert not list(tmp_path.iterdir())
