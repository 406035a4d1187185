"""What the trackers of all ports share: their clocks, what they store, and in which dtypes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from backends.pipeline.checkpoints.safetensors_io import TensorFile
from edm2_core.ema import Length
from edm2_core.errors import InputError

Arrays = dict[str, np.ndarray]


@dataclass
class Tracker:
    """A tracker of one port over NumPy arrays by name."""

    update: Callable[..., None]
    average: Callable[[], Arrays]
    save: Callable[..., Any]
    reconstruct: Callable[..., Arrays]
    time: Callable[[], int]


def torch_tracker(weights: Arrays, **options: Any) -> Tracker:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from backends.torch.ema import PowerEMA, reconstruct
    from backends.torch.weights import to_numpy

    module = torch.nn.Module()
    for name, array in weights.items():
        module.register_parameter(name, torch.nn.Parameter(torch.tensor(array), requires_grad=False))
    ema = PowerEMA(module, sigma_rels=(0.1,), **options)

    def update(new: Arrays, **when: Any) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(new[name]))
        ema.update(**when)

    def average() -> Arrays:
        return {name: to_numpy(tensor) for name, tensor in ema.arrays(0.1).items()}

    def rebuilt(folder: Any) -> Arrays:
        return {name: to_numpy(tensor) for name, tensor in reconstruct(folder, sigma_rel=0.1).items()}

    return Tracker(update, average, ema.save, rebuilt, lambda: ema.time)


def jax_tracker(weights: Arrays, *, jit: bool = False, **options: Any) -> Tracker:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    ema = pytest.importorskip("backends.jax.ema")
    state = [ema.init(weights, sigma_rels=(0.1,), **options)]
    advance = jax.jit(ema.update) if jit else ema.update

    def update(new: Arrays, *, time: int, delta: int) -> None:
        state[0] = advance(state[0], new, time=np.uint32(time) if jit else time, delta=delta)

    return Tracker(
        update,
        lambda: {name: np.asarray(leaf) for name, leaf in state[0].averages["0.1"].items()},
        lambda folder, **options: ema.save(folder, state[0], **options),
        lambda folder: {name: np.asarray(x) for name, x in ema.reconstruct(folder, sigma_rel=0.1).items()},
        lambda: state[0].time,
    )


def mlx_tracker(weights: Arrays, **options: Any) -> Tracker:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from backends.mlx.ema import PowerEMA, reconstruct

    def native(arrays: Arrays) -> Any:
        return {name: mx.array(array) for name, array in arrays.items()}

    ema = PowerEMA(native(weights), sigma_rels=(0.1,), **options)
    return Tracker(
        lambda new, **when: ema.update(native(new), **when),
        lambda: {name: np.array(x) for name, x in ema.arrays(0.1).items()},
        ema.save,
        lambda folder: {name: np.array(x) for name, x in reconstruct(folder, sigma_rel=0.1).items()},
        lambda: ema.time,
    )


TRACKERS = {"torch": torch_tracker, "jax": jax_tracker, "mlx": mlx_tracker}


@pytest.fixture(params=TRACKERS)
def tracker(request: pytest.FixtureRequest) -> Callable[..., Tracker]:
    return TRACKERS[request.param]


def weights(value: float, dtype: Any = np.float32) -> Arrays:
    return {"w": np.full(3, value, dtype)}


@pytest.mark.parametrize(
    ("before", "time", "delta", "message"),
    [
        (0, 300, 1, r"last update, 0, got 300 - 1: this tracker is new; .* start=299"),
        (100, 105, 1, r"last update, 100, got 105 - 1: delta is the time since the last update; give delta=5"),
        (100, 90, 1, r"last update, 100, got 90 - 1: the clock ran back"),
        (100, 100, 1, r"last update, 100, got 100 - 1: the clock ran back"),
        (100, 110, 50, r"last update, 100, got 110 - 50: delta is the time since .* give delta=10"),
        (0, 1 << 53, 1 << 53, "time must be a whole number from 1 to below 2\\^53"),
        (0, 1, 0, "delta must be a whole number from 1"),
    ],
)
def test_a_time_that_does_not_follow_the_clock_is_refused_and_changes_nothing(
    tracker: Callable[..., Tracker], before: int, time: int, delta: int, message: str
) -> None:
    made = tracker(weights(1.0))
    if before:
        made.update(weights(2.0), time=before, delta=before)
    was = made.average()["w"].copy()
    with pytest.raises(InputError, match=message):
        made.update(weights(5.0), time=time, delta=delta)
    assert made.time() == before
    assert np.array_equal(made.average()["w"], was)


@pytest.mark.parametrize("start", [0, 1 << 20, (1 << 31) - 3, (1 << 32) - 3, 1 << 40])
def test_clocks_go_on_from_a_start_and_beyond_32_bits(tracker: Callable[..., Tracker], start: int) -> None:
    made, exact = tracker(weights(1.0), start=start), np.float64(1)
    for step in range(1, 5):
        time, delta = start + step * 4_000_000, 4_000_000
        stay = Length.of(0.1).beta(t_next=time, t_delta=delta)
        exact = stay * exact + (1 - stay) * step
        made.update(weights(step), time=time, delta=delta)
        assert made.time() == time
    assert made.average()["w"] == pytest.approx(exact, rel=4e-6)


def test_a_wrong_time_inside_jit_makes_averages_nan_and_is_raised_when_they_are_saved(tmp_path: Any) -> None:
    made = jax_tracker(weights(1.0), jit=True)
    made.update(weights(1.0), time=8, delta=8)
    made.update(weights(2.0), time=(1 << 32) - 1, delta=8)
    assert np.isnan(made.average()["w"]).all()
    with pytest.raises(InputError, match="got another inside jit, so the averages are NaN"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_optax_form_has_the_clock_too() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    ema = pytest.importorskip("backends.jax.ema")
    transform, zero = ema.power_ema((0.1,), t_delta=4_000_000, start=(1 << 32) - 8_000_000), weights(0.0)
    state, step = transform.init(weights(1.0)), jax.jit(transform.update)
    for i in range(1, 4):
        _, state = step(zero, state, weights(1.0))
        assert state.time == (1 << 32) + (i - 2) * 4_000_000
    assert state.averages["0.1"]["w"] == pytest.approx(1.0)
    state = transform.init(weights(1.0))
    with pytest.raises(InputError, match="time - delta must be the time of the last update"):
        transform.update(zero, state, weights(1.0), time=5)
    own = ema.power_ema((0.1,))
    _, state = own.update(zero, own.init(weights(1.0)), weights(2.0), time=300)  # the first update copies
    assert (state.time, float(state.averages["0.1"]["w"][0])) == (300, 2.0)


def test_complex_weights_are_averaged_and_come_back(tracker: Callable[..., Tracker], tmp_path: Any) -> None:
    made, plain = (tracker(weights(value, dtype)) for value, dtype in ((1 + 2j, np.complex64), (1, np.float32)))
    for step, w in enumerate((3 - 1j, -2 + 5j), start=1):
        made.update(weights(w, np.complex64), time=10 * step, delta=10)
        plain.update(weights(w.real), time=10 * step, delta=10)
    got = made.average()["w"]
    assert got.dtype == np.complex64
    np.testing.assert_allclose(got.real, plain.average()["w"], rtol=1e-6)
    made.save(tmp_path)
    rebuilt = made.reconstruct(tmp_path)["w"]
    assert (rebuilt.dtype, rebuilt.shape) == (np.complex64, (3,))
    np.testing.assert_allclose(rebuilt, got, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_averages_are_stored_in_the_dtype_asked_for(tracker: Callable[..., Tracker], tmp_path: Any, dtype: str) -> None:
    made = tracker({"w": np.full(3, 1 / 3, np.float32), "large": np.full(2, 7e4, np.float32)})
    made.update({"w": np.full(3, 1 / 3, np.float32), "large": np.full(2, 7e4, np.float32)}, time=1, delta=1)
    (path,) = made.save(tmp_path, dtype=dtype)
    entries = TensorFile(path).entries
    assert entries["w"].dtype == {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]
    assert entries["large"].dtype == ("BF16" if dtype == "bfloat16" else "F32")
    rebuilt = made.reconstruct(tmp_path)
    assert rebuilt["w"] == pytest.approx(1 / 3, rel={"float16": 2**-11, "bfloat16": 2**-8, "float32": 1e-7}[dtype])
    assert rebuilt["large"] == pytest.approx(7e4, rel=2**-8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_weights_are_refused_by_name(tracker: Callable[..., Tracker], tmp_path: Any, value: float) -> None:
    made = tracker(weights(1.0))
    made.update(weights(value), time=1, delta=1)
    with pytest.raises(InputError, match=r"weights must be finite to be stored, got .* in w: training has diverged"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_and_keys_are_kept_as_they_are(tmp_path: Any) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    ema = pytest.importorskip("backends.jax.ema")
    tree = {"w": jax.numpy.ones(2), "rng": jax.random.key(7), "count": jax.numpy.asarray(2**31 - 1)}
    ema.save(tmp_path, ema.update(ema.init(tree), tree, time=1, delta=1))
    back = ema.reconstruct(tmp_path, sigma_rel=0.05, like=tree)
    assert jax.random.uniform(back["rng"]) == jax.random.uniform(tree["rng"])
    assert int(back["count"]) == 2**31 - 1


# ---- buffers, which torch and MLX have


MASK = np.float32([0, np.finfo(np.float32).min, -np.inf])


def assert_kept(got: dict[str, Any], to_numpy: Callable[[Any], np.ndarray]) -> None:
    arrays = {name: to_numpy(value) for name, value in got.items()}
    assert arrays["std"] == np.float32(3.1e-8)
    assert arrays["variance"] == np.float32(1e6)
    assert np.array_equal(arrays["mask"], MASK)


def test_torch_buffers_are_read_when_they_are_asked_for_and_stored_as_they_are(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from backends.torch.ema import PowerEMA, reconstruct

    module = torch.nn.Linear(2, 2)
    module.register_buffer("scale", torch.tensor(1.0))
    module.register_buffer("std", torch.tensor(3.1e-8))
    module.register_buffer("variance", torch.tensor([1e6]))
    module.register_buffer("mask", torch.from_numpy(MASK))
    module.register_buffer("narrow", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    module.register_buffer("waves", torch.tensor([1 + 2j]))
    ema = PowerEMA(module)
    module.double()  # moves the weights and replaces buffers
    for step in range(1, 4):
        module.scale = 0.5 * module.scale + 3.0
        ema.update(time=step, delta=1)
        ema.save(tmp_path)
    assert ema.arrays(0.1)["scale"] == module.scale == 5.375
    got = reconstruct(tmp_path, sigma_rel=0.07)
    assert (got["scale"], got["scale"].dtype) == (5.375, torch.float64)
    assert got["waves"] == torch.tensor([1 + 2j])
    assert got["narrow"].tolist() == [1.5, -2.0]
    assert_kept({name: got[name].float() for name in ("std", "variance", "mask")}, lambda t: t.numpy())
    module.load_state_dict(got)


def test_mlx_frozen_parameters_are_stored_as_they_are(tmp_path: Any) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from mlx import nn

    from backends.mlx.ema import PowerEMA, reconstruct

    module = nn.Linear(2, 2)
    module.std, module.variance, module.mask = mx.array(3.1e-8), mx.array([1e6]), mx.array(MASK)
    module.half = mx.array([1.5, -2.0], mx.bfloat16)
    module.freeze(keys=["std", "variance", "mask", "half"])
    ema = PowerEMA(module)
    for step in (1, 2):
        ema.update(time=step, delta=1)
        ema.save(tmp_path)
    got = reconstruct(tmp_path, sigma_rel=0.07)
    assert got["half"].dtype == mx.bfloat16
    assert_kept(got, lambda x: np.array(x.astype(mx.float32)))


def test_reconstructed_files_keep_what_is_not_averaged(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from backends.commands.cli import main
    from backends.torch.ema import PowerEMA, reconstruct

    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.from_numpy(MASK))
    ema = PowerEMA(module)
    for step in range(1, 9):
        ema.update(time=step, delta=1)
        ema.save(tmp_path)
    options = ["--sigma-rels", "0.07", "--outdir", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(["reconstruct", str(tmp_path), *options]) == 0
    (path,) = (tmp_path / "out").glob("*.safetensors")
    entries = TensorFile(path).entries
    assert (entries["mask"].dtype, entries["weight"].dtype) == ("F32", "BF16")
    got = reconstruct(path.parent, sigma_rel=0.07)
    assert np.array_equal(got["mask"].numpy(), MASK)
    assert torch.allclose(got["weight"], module.weight, rtol=2**-7)  # stochastic rounding: a spacing of bfloat16
