"""Averages of pytrees in JAX: as an optax transformation and as plain functions, under jit and not."""

import os
import subprocess
import sys

import numpy as np
import pytest

from backends.pipeline.checkpoints.snapshots import load_snapshot
from edm2_core.ema import Length, profile, sigma_rel_to_gamma
from edm2_core.ema import beta as exact_beta
from edm2_core.errors import InputError

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
jnp = jax.numpy
ema = pytest.importorskip("backends.jax.ema")


def tree(value=1.0, dtype=jnp.float32):
    return {"layers": [{"w": jnp.full((2, 3), value, dtype)}, {"w": jnp.ones(4, dtype)}], "seen": jnp.asarray(3)}


def path(t):
    return 1 + np.sin(3 * t)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1])
def test_updating_every_k_steps_converges_to_the_integral(sigma_rel):
    every, end = 5, 1000
    state, update = ema.init(tree(100.0), sigma_rels=(sigma_rel,)), jax.jit(ema.update)
    for time in range(every, end + 1, every):
        state = update(state, tree(path((time - every / 2) / end)), time=time, delta=every)
    fine = (np.arange(20_000) + 0.5) / 20_000 * end
    truth = (profile(fine, end_time=float(end), sigma_rel=sigma_rel) * path(fine / end)).mean() * end
    # the midpoint rule: h^2 / 24 times the change of a derivative of at most 3 max p; rounding of 200 updates
    bound = (every / end) ** 2 / 24 * 2 * 3 / sigma_rel + 200 * 2.0**-23
    assert abs(float(state.averages[repr(sigma_rel)]["layers"][0]["w"][0, 0]) - truth) < bound


@pytest.mark.parametrize("time", [4096, 10**6, 2**31 + 1, 2**32, 2**40, 2**52])
def test_the_share_of_the_weights_is_right_to_a_few_roundings_however_small(time):
    """From 0 to 1 an average moves by 1 - beta; from 1 to 0, beta remains."""

    def moved(start, end):
        state = ema.init({"w": jnp.full((), start)}, sigma_rels=(0.05,), start=time - 2048)
        state = ema.update(state, {"w": jnp.full((), end)}, time=time, delta=2048)
        return float(state.averages["0.05"]["w"])

    share = -np.expm1((sigma_rel_to_gamma(0.05) + 1) * np.log1p(-2048 / time))
    assert moved(0.0, 1.0) == pytest.approx(share, rel=1e-6)
    assert moved(1.0, 0.0) == pytest.approx(exact_beta(0.05, t_next=time, t_delta=2048), rel=1e-5)


def test_a_half_life_is_averaged_under_its_key():
    life = Length.half_life(100)
    state = ema.init({"w": jnp.zeros(())}, sigma_rels=(life,), start=250)
    moved = ema.update(state, {"w": jnp.ones(())}, time=300, delta=50).averages
    assert list(moved) == [life.key]
    assert float(moved[life.key]["w"]) == pytest.approx(1 - life.beta(t_next=300, t_delta=50), rel=1e-6)


def loop(steps, state=None, jit=True):
    """Gradient descent with optax, the averages last in the chain; params and state are donated."""
    optimizer = optax.chain(optax.adam(1e-2), ema.power_ema((0.05, 0.10), t_delta=16))

    def step(params, opt_state, x):
        gradients = jax.grad(lambda p: jnp.sum((p["w"] * x - 1) ** 2))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    if jit:
        step = jax.jit(step, donate_argnums=(0, 1))
    params, opt_state, first = state or ({"w": jnp.arange(1.0, 5.0)}, None, 0)
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    for i in range(first, steps):
        params, opt_state = step(params, opt_state, jnp.float32(1 + i % 3))
    return params, opt_state, steps


def test_in_optax_it_averages_what_parameters_become_and_leaves_updates_alone():
    params, state, _ = loop(1)
    assert same(state[-1].averages["0.05"], params)  # the first update copies
    params, state, _ = loop(30)
    assert int(state[-1].time) == 480
    short, long = (np.linalg.norm(state[-1].averages[s]["w"] - params["w"]) for s in ("0.05", "0.1"))
    assert 0 < short < long  # they moved, the shorter nearer
    plain = optax.adam(1e-2)
    alone, alone_state = {"w": jnp.arange(1.0, 5.0)}, plain.init({"w": jnp.arange(1.0, 5.0)})
    for i in range(30):
        gradients = jax.grad(lambda p, x=1.0 + i % 3: jnp.sum((p["w"] * x - 1) ** 2))(alone)
        updates, alone_state = plain.update(gradients, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    np.testing.assert_allclose(params["w"], alone["w"], rtol=1e-5)


def test_jit_changes_no_more_than_rounding():
    (_, one, _), (_, other, _) = loop(10), loop(10, jit=False)
    for s in ("0.05", "0.1"):
        np.testing.assert_allclose(one[-1].averages[s]["w"], other[-1].averages[s]["w"], rtol=1e-5)


def test_stopping_and_going_on_is_not_stopping():
    whole = loop(20)
    params, state, _ = loop(8)
    leaves, structure = jax.tree.flatten((params, state))
    kept = [np.asarray(leaf) for leaf in leaves]  # as a checkpoint holds them
    params, state = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in kept])
    assert same(loop(20, (params, state, 8))[:2], whole[:2])


def test_parameters_may_be_donated_after_init():
    params = tree()
    state = ema.init(params)
    update = jax.jit(lambda p, s, time: (p, ema.update(s, p, time=time, delta=1)), donate_argnums=(0, 1))
    params, state = update(params, state, 1)
    params, state = update(params, state, 2)
    assert np.array_equal(state.averages["0.05"]["seen"], 3)


def test_bfloat16_is_averaged_in_float32_and_whole_numbers_are_taken():
    state = ema.update(
        ema.init(tree(dtype=jnp.bfloat16)), tree(2.0, jnp.bfloat16) | {"seen": jnp.asarray(9)}, time=4, delta=4
    )
    average = state.averages["0.1"]
    assert average["layers"][0]["w"].dtype == jnp.float32
    assert int(average["seen"]) == 9


def test_what_is_saved_is_the_common_format_and_comes_back_as_a_tree(tmp_path):
    params = tree(1.5)
    state = ema.update(ema.init(params), params, time=64, delta=64)
    paths = ema.save(tmp_path, state)
    assert [p.name for p in paths] == ["000000000064-0.050.safetensors", "000000000064-0.100.safetensors"]
    assert set(load_snapshot(paths[0]).params) == {"layers.0.w", "layers.1.w", "seen"}
    assert same(ema.reconstruct(tmp_path, sigma_rel=0.05, like=params), params)
    assert set(ema.reconstruct(tmp_path, sigma_rel=0.05)) == {"layers.0.w", "layers.1.w", "seen"}
    with pytest.raises(InputError, match=r"must have the arrays of like, got layers\.2\.w missing"):
        ema.reconstruct(tmp_path, sigma_rel=0.05, like=params | {"layers": [*params["layers"], {"w": jnp.ones(1)}]})


def test_reconstruction_follows_a_tracked_length(tmp_path):
    state, truth = ema.init(tree()), ema.init(tree(), sigma_rels=(0.15,))
    update = jax.jit(ema.update)
    for step in range(1, 321):
        live = tree(path(step / 320))
        state, truth = (update(s, live, time=step * 10, delta=10) for s in (state, truth))
        if step % 20 == 0:
            ema.save(tmp_path, state)
    got = ema.reconstruct(tmp_path, sigma_rel=0.15)["layers.0.w"]
    want = truth.averages["0.15"]["layers"][0]["w"]
    stored = state.averages["0.05"]["layers"][0]["w"]
    assert np.abs(got - want).max() < 0.1 * np.abs(stored - want).max()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match="sigma_rels must be one or more"):
        ema.power_ema(())
    with pytest.raises(InputError, match=r"got 0\.3"):
        ema.init(tree(), sigma_rels=(0.3,))
    transform = ema.power_ema(t_delta=1)
    with pytest.raises(InputError, match="averages parameters, got none"):
        transform.update(tree(), transform.init(tree()))
    with pytest.raises(InputError, match="needs t_delta"):
        ema.power_ema().update(tree(), ema.init(tree()), tree())
    with pytest.raises(InputError, match="leaves must be arrays, got str at name"):
        ema.init({"name": "net"})
    with pytest.raises(InputError, match="must be of a time above 0"):
        ema.save(tmp_path, ema.init(tree()))


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from backends.jax import device, ema

mesh = device.mesh_of(jax.devices())
assert mesh.size == 2
def save(name, place):
    params = jax.device_put({"w": jax.numpy.arange(12.0).reshape(6, 2), "b": jax.numpy.ones(3)}, place)
    state = ema.init(params)
    for step in (1, 2, 3):
        params = jax.tree.map(lambda x: 1.25 * x + step, params)
        state = jax.jit(ema.update)(state, params, time=step, delta=1)
    assert len(state.averages["0.05"]["w"].sharding.device_set) == len(place["w"].device_set)
    ema.save(f"{sys.argv[1]}/{name}", state)
    return params

alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
save("whole", {"w": alone, "b": alone})
params = save("sharded", {"w": NamedSharding(mesh, PartitionSpec("data")), "b": device.whole(mesh)})
back = ema.reconstruct(f"{sys.argv[1]}/sharded", sigma_rel=0.05, like=params)
assert back["w"].shape == (6, 2)
"""


def test_arrays_that_are_sharded_over_devices_are_saved_as_whole_ones(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "sharded"))
    assert one == other
