"""Tracked averages equal the integral of their profile, in every array library, and leave their inputs alone."""

from importlib import import_module

import numpy as np
import pytest

from edm2_core.ema import Length, profile
from edm2_core.ema.tracking import advance, start
from edm2_core.errors import InputError

LIBRARIES = ("numpy", "array_api_strict", "torch", "jax.numpy", "mlx.core")
HALVES = (("numpy", "float16"), ("torch", "bfloat16"), ("jax.numpy", "bfloat16"), ("mlx.core", "bfloat16"))
EPS = 2.0**-23


@pytest.fixture(params=LIBRARIES)
def xp(request):
    return load(request.param)


def load(name):
    pytest.importorskip(name.partition(".")[0], reason=f"{name} is not installed")
    return import_module(name)


def host(x):
    return np.asarray(x.float() if hasattr(x, "detach") else x, np.float64)


def weights_of(xp, value):
    return {
        "w": xp.asarray([[value, 2.0 * value]], dtype=xp.float32),
        "gain": xp.asarray(value, dtype=xp.float32),
        "seen": xp.asarray(int(value), dtype=xp.int32),
    }


def path(t):
    """A weight over training: smooth, so that its integral is easy, and not linear."""
    return 1 + np.sin(3 * t)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.10, 0.25])
def test_it_converges_to_the_integral_of_the_weights_over_their_profile(xp, sigma_rel):
    every, end = 5, 1000
    averages = start(weights_of(xp, 100.0), sigma_rels=(sigma_rel,))
    for time in range(every, end + 1, every):
        averages = advance(averages, weights_of(xp, path((time - every / 2) / end)), t_next=time, t_delta=every)
    fine = (np.arange(20_000) + 0.5) / 20_000 * end
    truth = (profile(fine, end_time=float(end), sigma_rel=sigma_rel) * path(fine / end)).mean() * end
    # the midpoint rule: h^2 / 24 times the change of a derivative of at most 3 max p; rounding of 200 updates
    bound = (every / end) ** 2 / 24 * 2 * 3 / sigma_rel + 200 * EPS
    assert abs(host(averages[sigma_rel]["gain"]) - truth) < bound


def test_a_traditional_average_converges_to_the_integral_over_its_own(xp):
    every, end, length = 5, 1000, Length.half_life(150)
    averages = start(weights_of(xp, 100.0), sigma_rels=(0.1, length))
    for time in range(every, end + 1, every):
        averages = advance(averages, weights_of(xp, path((time - every / 2) / end)), t_next=time, t_delta=every)
    fine = (np.arange(20_000) + 0.5) / 20_000 * end
    truth = (length.profile(float(end))(fine) * path(fine / end)).mean() * end
    # the midpoint rule: h^2 / 24 times the largest second derivative, 9 of the path and 2 rate slope of the profile
    rate = np.log(2) / 150 * end
    bound = (every / end) ** 2 / 24 * (9 + 2 * rate * 3) + 200 * EPS
    assert abs(host(averages[length]["gain"]) - truth) < bound
    assert list(averages) == [0.1, length]


def test_weights_that_hold_still_are_averaged_the_same_at_any_interval(xp):
    """Every step, or only when they change: exact, so nothing is lost by rare updates."""
    often = rare = start(weights_of(xp, 9.0), sigma_rels=(0.1,))
    for time in range(1, 121):
        held = weights_of(xp, path(time // 31))
        often = advance(often, held, t_next=time, t_delta=1)
        if time in (30, 61, 92, 120):
            rare = advance(rare, held, t_next=time, t_delta={30: 30, 61: 31, 92: 31, 120: 28}[time])
    np.testing.assert_allclose(host(often[0.1]["w"]), host(rare[0.1]["w"]), rtol=120 * EPS)


def test_the_first_update_copies_and_later_ones_move(xp):
    averages = advance(start(weights_of(xp, 1.0)), weights_of(xp, 1 / 3), t_next=7, t_delta=7)
    assert all((host(average["w"]) == host(weights_of(xp, 1 / 3)["w"])).all() for average in averages.values())
    later = advance(averages, weights_of(xp, 2.0), t_next=8, t_delta=1)
    short, long = (float(host(later[s]["gain"])) for s in (0.05, 0.10))
    assert 1 / 3 < long < short < 2


def test_arguments_stay_as_they_are_and_lend_no_memory(xp):
    weights = weights_of(xp, 3.0)
    averages = start(weights)
    after = advance(averages, weights_of(xp, 5.0), t_next=2, t_delta=1)
    assert all(float(host(average["gain"])) == 3 for average in averages.values())
    assert after[0.05] is not averages[0.05]
    if xp.__name__ in ("numpy", "torch", "array_api_strict", "mlx.core"):  # libraries that can write in place
        weights["w"][0, 0] = 77.0
        assert all(float(host(average["w"])[0, 0]) == 3 for average in averages.values())


def test_what_does_not_float_is_taken_from_the_weights(xp):
    averages = advance(start(weights_of(xp, 3.0)), weights_of(xp, 5.0), t_next=9, t_delta=1)
    assert averages[0.05]["seen"].dtype == xp.int32
    assert int(averages[0.05]["seen"]) == 5


@pytest.mark.parametrize(("library", "half"), HALVES)
def test_half_precision_is_averaged_in_float32(library, half):
    xp = load(library)
    weights = {"w": xp.asarray([1.0, 2.0], dtype=getattr(xp, half))}
    averages = advance(start(weights), weights, t_next=1e6, t_delta=1)
    assert averages[0.1]["w"].dtype == xp.float32
    assert (host(averages[0.1]["w"]) == [1, 2]).all()


def test_wide_weights_keep_their_precision():
    weights = {"w": np.asarray([1 / 3])}
    averages = advance(start(weights), weights, t_next=2, t_delta=1)
    assert averages[0.1]["w"].dtype == np.float64
    assert averages[0.1]["w"] == [1 / 3]


def test_torch_parameters_leave_no_graph():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights = {"w": torch.nn.Parameter(torch.ones(2))}
    averages = advance(start(weights), weights, t_next=2, t_delta=1)
    assert not averages[0.1]["w"].requires_grad


@pytest.mark.parametrize("lengths", [(), (0.0,), (0.3,), (-0.1,), (0.05, float("nan"))])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(InputError, match="sigma_rel") as caught:
        start(weights_of(np, 1.0), sigma_rels=lengths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.ones(2)}, "averages lack extra"),
        ({"w": None}, "weights lack w"),
        ({"w": np.ones((2, 1), np.float32)}, r"w must have the shape of its average \(1, 2\), got \(2, 1\)"),
    ],
)
def test_other_names_and_shapes_are_refused_in_one_line(change, message):
    weights = {name: x for name, x in (weights_of(np, 1.0) | change).items() if x is not None}
    with pytest.raises(InputError, match=message) as caught:
        advance(start(weights_of(np, 1.0)), weights, t_next=2, t_delta=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("t_next", "t_delta"), [(1, 0), (1, 2), (0, 1), (-1, -1)])
def test_a_clock_that_stands_or_starts_below_zero_is_refused(t_next, t_delta):
    with pytest.raises(InputError, match=r"t_delta|t_next"):
        advance(start(weights_of(np, 1.0)), weights_of(np, 1.0), t_next=t_next, t_delta=t_delta)
