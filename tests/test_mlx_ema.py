"""Averages of modules and trees in MLX."""

import numpy as np
import pytest

from backends.pipeline.checkpoints.snapshots import load_snapshot
from edm2_core.ema import Length, profile
from edm2_core.errors import InputError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
nn = pytest.importorskip("mlx.nn")
utils = pytest.importorskip("mlx.utils")
ema = pytest.importorskip("backends.mlx.ema")


def model():
    mx.random.seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.Linear(4, 2))
    mx.eval(made.parameters())
    return made


def walk(made, seed):
    mx.random.seed(seed)
    moved = utils.tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), made.trainable_parameters())
    made.update(moved)


def host(arrays):
    return {name: np.array(x) for name, x in arrays.items()}


def path(t):
    return 1 + np.sin(3 * t)


def test_updating_every_k_steps_converges_to_the_integral():
    every, end, sigma_rel = 5, 1000, 0.1
    tracker = ema.PowerEMA({"a": [mx.array(100.0)]}, sigma_rels=(sigma_rel,))
    for time in range(every, end + 1, every):
        tracker.update({"a": [mx.array(path((time - every / 2) / end))]}, time=time, delta=every)
    fine = (np.arange(20_000) + 0.5) / 20_000 * end
    truth = (profile(fine, end_time=float(end), sigma_rel=sigma_rel) * path(fine / end)).mean() * end
    bound = (every / end) ** 2 / 24 * 2 * 3 / sigma_rel + 200 * 2.0**-23  # as in test_tracking.py
    assert abs(tracker.arrays(sigma_rel)["a.0"].item() - truth) < bound


def test_the_module_is_untouched_and_what_is_frozen_is_kept():
    made = model()
    before = host(dict(utils.tree_flatten(made.parameters())))
    tracker = ema.PowerEMA(made)
    tracker.update(time=1, delta=1)
    assert all(np.array_equal(before[n], x) for n, x in host(dict(utils.tree_flatten(made.parameters()))).items())
    assert tracker.arrays(0.05).keys() == before.keys()
    assert "layers.1.running_mean" not in tracker.averages[Length.of(0.05)]


def test_only_what_trains_can_be_kept():
    made = model()
    made.layers[0].freeze()
    tracker = ema.PowerEMA(made, trainable_only=True)
    walk(made, 1)
    tracker.update(time=1, delta=1)
    assert set(tracker.arrays(0.05)) == {f"layers.{i}.{n}" for i in (1, 2) for n in ("weight", "bias")}


def test_stopping_and_going_on_is_not_stopping(tmp_path):
    made = model()
    whole, first = ema.PowerEMA(made), ema.PowerEMA(made)
    for step in range(1, 9):
        walk(made, step)
        whole.update(time=step * 4, delta=4)
        if step <= 3:
            first.update(time=step * 4, delta=4)
        if step == 3:
            mx.save_safetensors(str(tmp_path / "state.safetensors"), first.state_dict())
            first = ema.PowerEMA(made)
            first.load_state_dict(mx.load(str(tmp_path / "state.safetensors")))
        if step > 3:
            first.update(time=step * 4, delta=4)
    assert first.time == whole.time == 32
    assert all(np.array_equal(x, host(first.arrays(0.1))[n]) for n, x in host(whole.arrays(0.1)).items())


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    tracker = ema.PowerEMA(model())
    before = host(tracker.averages[Length.of(0.05)])
    with pytest.raises(InputError, match="must track the same lengths"):
        tracker.load_state_dict(ema.PowerEMA(model(), sigma_rels=(0.2,)).state_dict())
    assert all(np.array_equal(before[n], x) for n, x in host(tracker.averages[Length.of(0.05)]).items())


def test_memory_does_not_grow_with_updates():
    made = model()
    tracker = ema.PowerEMA(made)
    used = []
    for step in range(1, 41):
        walk(made, step)
        mx.eval(made.parameters())
        tracker.update(time=step, delta=1)
        used.append(mx.get_active_memory())
    assert used[-1] <= used[5] * 1.01


def test_reconstruction_loads_into_the_module_and_follows_a_tracked_length(tmp_path):
    made = model()
    stored, truth = ema.PowerEMA(made), ema.PowerEMA(made, sigma_rels=(0.15,))
    start = made.layers[0].weight
    for step in range(1, 161):
        made.layers[0].weight = start * path(step / 160)
        stored.update(time=step * 10, delta=10)
        truth.update(time=step * 10, delta=10)
        if step % 10 == 0:
            paths = stored.save(tmp_path)
    got = ema.reconstruct(tmp_path, sigma_rel=0.15)
    made.load_weights(list(got.items()))
    want = np.array(truth.arrays(0.15)["layers.0.weight"])
    near, far = np.array(made.layers[0].weight), np.array(stored.arrays(0.05)["layers.0.weight"])
    assert np.abs(near - want).max() < 0.15 * np.abs(far - want).max()
    assert load_snapshot(paths[0]).nimg == 1600


def test_inside_a_compiled_function_the_averages_are_those_of_update():
    first, second = ({"w": mx.array([1.0, -2.0, 3.0]) + k, "n": mx.array(k)} for k in (0, 1))
    tracker = ema.PowerEMA(first, sigma_rels=(0.05, Length.half_life(3)), start=6)
    start = list(tracker.averages.values())
    tracker.update(second, time=8, delta=2)
    shares = mx.array([1 - length.beta(t_next=8, t_delta=2) for length in tracker.averages])
    for got, wanted in zip(mx.compile(ema.advance)(start, second, shares), tracker.averages.values(), strict=True):
        assert np.array(got["w"]) == pytest.approx(np.array(wanted["w"]), rel=1e-6)
        assert got["n"].item() == wanted["n"].item() == 1


def test_bfloat16_is_averaged_in_float32():
    tracker = ema.PowerEMA({"w": mx.ones((3,), mx.bfloat16)})
    tracker.update({"w": mx.ones((3,), mx.bfloat16)}, time=1, delta=1)
    assert tracker.arrays(0.05)["w"].dtype == mx.float32


def test_frameworks_write_the_same_bytes(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from backends.jax import ema as in_jax
    from backends.torch.ema import PowerEMA, reconstruct

    weight = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    module = torch.nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
    of_torch, of_mlx = PowerEMA(module), ema.PowerEMA({"weight": mx.array(weight)})
    of_torch.update(time=8, delta=8)
    of_mlx.update({"weight": mx.array(weight)}, time=8, delta=8)
    of_jax = in_jax.init({"weight": jax.numpy.asarray(weight)})
    of_jax = in_jax.update(of_jax, {"weight": jax.numpy.asarray(weight)}, time=8, delta=8)
    written = [of_torch.save(tmp_path / "t"), of_mlx.save(tmp_path / "m"), in_jax.save(tmp_path / "j", of_jax)]
    for paths in zip(*written, strict=True):
        assert len({p.read_bytes() for p in paths}) == 1
    assert np.array_equal(
        np.array(ema.reconstruct(tmp_path / "t", sigma_rel=0.05)["weight"]),
        reconstruct(tmp_path / "m", sigma_rel=0.05)["weight"].numpy(),
    )


def test_mistakes_are_one_line():
    with pytest.raises(InputError, match="sigma_rels must be one or more"):
        ema.PowerEMA(model(), sigma_rels=())
    with pytest.raises(InputError, match="needs the parameters of a tree"):
        ema.PowerEMA({"w": mx.ones(2)}).update(time=1, delta=1)
    with pytest.raises(InputError, match=r"must be one of those tracked, 0\.05, 0\.1, got 0\.2"):
        ema.PowerEMA(model()).arrays(0.2)
    with pytest.raises(InputError, match="must have the shape of its average"):
        ema.PowerEMA({"w": mx.ones(2)}).update({"w": mx.ones(3)}, time=1, delta=1)
