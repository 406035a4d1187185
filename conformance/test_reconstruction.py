"""Averages rebuilt from stored ones: the coefficients, what they give, and how far off that is (SPEC EMA)."""

from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.averages import exact_gamma, exact_product, segment_weights, track
from conformance.clauses import proves
from edm2_core import ema
from edm2_core.ema import Length
from edm2_core.ema.profiles import Profile
from edm2_core.errors import InputError

EPS = tolerance.eps("float64")


@st.composite
def snapshots(draw_: Any, *, most: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of time and length, in images: evenly spaced times, two lengths."""
    count, spacing = draw_(st.integers(1, most)), draw_(st.sampled_from([1.0, 1000.0, 8.0 * 2**20]))
    short = draw_(st.floats(0.03, 0.08))
    pair = (short, draw_(st.floats(short + 0.05, 0.28)))
    return np.repeat(np.arange(1, count + 1.0) * spacing, 2), np.tile(pair, count)


def gram_of(t: np.ndarray, s: np.ndarray) -> np.ndarray:
    return ema.inner_product(time_a=t[:, None], sigma_rel_a=s[:, None], time_b=t[None], sigma_rel_b=s[None])


@proves("EMA-5")
@given(snapshots(), st.floats(0.03, 0.28), st.floats(0.3, 1.0))
def test_coefficients_are_the_least_squares_fit(stored: tuple[np.ndarray, np.ndarray], s: float, at: float) -> None:
    """Oracle: Algorithm 3 in 60 digits, each column divided by its sum. Later snapshots get 0."""
    t_in, s_in = stored
    end = max(at * t_in[-1], t_in[0])
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=end, out_sigma_rel=s)
    assert got.shape == (len(t_in), 1)
    usable = t_in <= end
    with mpmath.workdps(60):
        profiles = [(t, exact_gamma(length)) for t, length in zip(t_in[usable], s_in[usable], strict=True)]
        target = (end, exact_gamma(s))
        gram = mpmath.matrix([[exact_product(*a, *b) for b in profiles] for a in profiles])
        fit = mpmath.lu_solve(gram, mpmath.matrix([exact_product(*a, *target) for a in profiles]))
        wanted = np.asarray([float(c / sum(fit)) for c in fit])
    condition = tolerance.gram_condition(gram_of(t_in[usable], s_in[usable]))
    allowed = 64 * EPS * condition * np.abs(wanted).max()
    assert np.allclose(got[usable, 0], wanted, rtol=0, atol=allowed)
    assert not got[~usable].any()
    assert got.sum() == pytest.approx(1, abs=1e-12 * (1 + np.abs(got).sum()))


@proves("EMA-5")
@given(snapshots(), st.floats(0.03, 0.28), st.floats(1e-6, 1e6))
def test_coefficients_do_not_depend_on_the_unit_of_time(
    stored: tuple[np.ndarray, np.ndarray], s: float, unit: float
) -> None:
    t_in, s_in = stored
    options: Any = {"in_sigma_rel": s_in, "out_sigma_rel": s}
    wanted = ema.coefficients(in_time=t_in, out_time=t_in[-1], **options)
    got = ema.coefficients(in_time=t_in * unit, out_time=t_in[-1] * unit, **options)
    allowed = 256 * EPS * tolerance.gram_condition(gram_of(t_in, s_in)) * np.abs(wanted).max()
    assert np.allclose(got, wanted, rtol=0, atol=allowed)


@proves("EMA-5")
@given(snapshots(most=3), st.floats(0.03, 0.28), st.integers(2, 4))
def test_duplicates_share_evenly(stored: tuple[np.ndarray, np.ndarray], s: float, times_over: int) -> None:
    """Each of k copies of a snapshot gets 1 / k of its coefficient."""
    t_in, s_in = stored
    single = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[-1], out_sigma_rel=s)
    again: Any = {"in_time": np.tile(t_in, times_over), "in_sigma_rel": np.tile(s_in, times_over)}
    got = ema.coefficients(**again, out_time=t_in[-1], out_sigma_rel=s)
    allowed = 256 * EPS * times_over * tolerance.gram_condition(gram_of(t_in, s_in)) * np.abs(single).max()
    assert np.allclose(got, np.tile(single, (times_over, 1)) / times_over, rtol=0, atol=allowed)


@proves("EMA-6")
@given(snapshots(), st.data())
def test_stored_averages_are_found(stored: tuple[np.ndarray, np.ndarray], data: Any) -> None:
    """A target that is stored has a one-hot column."""
    t_in, s_in = stored
    wanted = data.draw(st.lists(st.integers(0, len(t_in) - 1), min_size=1, max_size=3))
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[wanted], out_sigma_rel=s_in[wanted])
    allowed = 64 * EPS * tolerance.gram_condition(gram_of(t_in, s_in))
    assert np.allclose(got, np.eye(len(t_in))[:, wanted], rtol=0, atol=allowed)


@proves("EMA-7")
@draw.fewer(4)
@given(st.floats(0.04, 0.25), st.sampled_from([8, 16, 32]), draw.seeds, st.booleans())
def test_reconstruction_error_is_predicted(s: float, count: int, seed: int, walk: bool) -> None:
    """Weights that are white noise, or a random walk, tracked at (0.05, 0.10) and reconstructed at another length.

    The error of the rebuilt average is sum_k r_k w_k with r_k the residual profile's integral over step k. For white
    noise its variance is sum r_k^2, about delta times the residual's squared L2 norm; for a walk, the sum of squares
    of r's tail sums. 2000 independent weights: within 6 standard errors.
    """
    steps, parameters = 16 * count, 2000
    edges = np.arange(steps + 1.0)
    moves = np.random.default_rng(seed).standard_normal((steps, parameters))
    weights = np.cumsum(moves, axis=0) if walk else moves
    t_in = np.repeat(np.arange(1, count + 1) * 16.0, 2)
    s_in = np.tile([0.05, 0.10], count)
    histories = {length: track(weights, edges, length) for length in (0.05, 0.10)}
    stored = np.stack([histories[length][int(t) - 1] for t, length in zip(t_in, s_in, strict=True)])
    c = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=float(steps), out_sigma_rel=s)[:, 0]
    error = c @ stored - track(weights, edges, s)[-1]

    profiles = np.stack([segment_weights(edges, length, t) for t, length in zip(t_in, s_in, strict=True)])
    residual = c @ profiles - segment_weights(edges, s, float(steps))
    response = np.cumsum(residual[::-1]) if walk else residual  # to each independent move
    predicted = float(np.sum(response**2))
    assume(predicted > 1e-18)  # s is one of the stored
    assert np.mean(error**2) / predicted == pytest.approx(1, abs=tolerance.mean_square(parameters))


@proves("EMA-7")
@draw.fewer(4)
@given(st.floats(0.04, 0.25), st.sampled_from([8, 32]))
def test_residual_is_that_of_inner_products(s: float, count: int) -> None:
    """The L2 norm of the residual from Eq. 151 is that of its profile on a fine grid."""
    t_in, s_in = np.repeat(np.arange(1.0, count + 1), 2), np.tile([0.05, 0.10], count)
    end = float(count)
    c = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=end, out_sigma_rel=s)[:, 0]
    target = ema.inner_product(time_a=t_in, sigma_rel_a=s_in, time_b=end, sigma_rel_b=s)
    norm = ema.inner_product(time_a=end, sigma_rel_a=s, time_b=end, sigma_rel_b=s)
    predicted = c @ gram_of(t_in, s_in) @ c - 2 * c @ target + norm
    t = (np.arange(4000 * count) + 0.5) / 4000
    stored = ema.profile(t[None], end_time=t_in[:, None], sigma_rel=s_in[:, None])
    residual = c @ stored - ema.profile(t, end_time=end, sigma_rel=s)
    assert np.sum(residual**2) / 4000 == pytest.approx(predicted, rel=1e-3, abs=1e-9 * norm)


@proves("API-4", "EMA-5")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_time": [], "in_sigma_rel": []}, r"one or more numbers in a row, got shape \(0,\)"),
        ({"in_time": [-1.0]}, r"in_time must be positive, got -1"),
        ({"in_sigma_rel": [0.3]}, r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
        ({"out_sigma_rel": 0.0}, r"sigma_rel must be within \(0, 0.2887\), got 0"),
        ({"out_time": 0.5}, r"between the first snapshot and the last, 1 to 2, got 0.5: choose"),
        ({"out_time": 2.5}, r"between the first snapshot and the last, 1 to 2, got 2.5: choose"),
        ({"in_sigma_rel": [0.1, 0.3]}, r"sigma_rel must be within \(0, 0.2887\), got 0.3"),
    ],
)
def test_coefficients_refuse(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"in_time": [1.0, 2.0], "in_sigma_rel": 0.1, "out_time": 2.0, "out_sigma_rel": 0.1}
    with pytest.raises(InputError, match=message):
        ema.coefficients(**options | change)


def uniform(count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` files: equal intervals, lengths 0.05 and 0.10."""
    return np.repeat(np.arange(1, count // 2 + 1) * 8.0 * 2**20, 2), np.tile([0.05, 0.10], count // 2)


@proves("EMA-5")
@pytest.mark.parametrize("files", [16, 64])
def test_coefficients_keep_nine_digits(files: int) -> None:
    """Oracle: a solution in 60 digits, for as many files as a usual run stores."""
    t_in, s_in = uniform(files)
    s_out = np.array([0.015, 0.03, 0.075, 0.15, 0.25])
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[-1], out_sigma_rel=s_out)
    with mpmath.workdps(60):
        profiles = [(t, exact_gamma(length)) for t, length in zip(t_in, s_in, strict=True)]
        gram = mpmath.matrix([[exact_product(*a, *b) for b in profiles] for a in profiles])
        for column, length in enumerate(s_out):
            target = (t_in[-1], exact_gamma(length))
            fit = mpmath.lu_solve(gram, mpmath.matrix([exact_product(*a, *target) for a in profiles]))
            wanted = np.array([float(c / sum(fit)) for c in fit])
            assert tolerance.relative(got[:, column], wanted) < 1e-9


@proves("EMA-5")
def test_profiles_keep_nine_digits_from_512_files() -> None:
    """The residual of the normal equations, in 60 digits, gives the error e of the coefficients to a few digits.

    G e = G c S - b, with S the sum that c was divided by.
    """
    t_in, s_in = uniform(512)
    s_out = np.array([0.015, 0.05, 0.25])
    got = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[-1], out_sigma_rel=s_out)
    gram = gram_of(t_in, s_in)
    with mpmath.workdps(60):
        gammas = {length: exact_gamma(length) for length in (*s_in[:2], *s_out)}
        known: dict[tuple[Any, ...], Any] = {}

        def product(t_a: float, s_a: float, t_b: float, s_b: float) -> Any:
            if t_a > t_b:
                t_a, s_a, t_b, s_b = t_b, s_b, t_a, s_a
            key = (t_a / t_b, s_a, s_b)  # t_a and t_b are small multiples of a power of 2
            if key not in known:
                known[key] = exact_product(t_a, gammas[s_a], t_b, gammas[s_b]) * t_b
            return known[key] / t_b

        for column, length in enumerate(s_out):
            c = [mpmath.mpf(float(x)) for x in got[:, column]]
            applied = [
                mpmath.fdot(c, [product(t, s, *other) for t, s in zip(t_in, s_in, strict=True)])
                for other in zip(t_in, s_in, strict=True)
            ]
            wanted = [product(*own, t_in[-1], length) for own in zip(t_in, s_in, strict=True)]
            total = mpmath.fdot(c, wanted) / mpmath.fdot(c, applied)
            residual = np.array([float(a * total - b) for a, b in zip(applied, wanted, strict=True)])
            total = float(total)
        e = np.linalg.solve(gram, residual) / total
        error = e - got[:, column] * e.sum()
        assert np.sqrt(error @ gram @ error / (got[:, column] @ gram @ got[:, column])) < 1e-9


@proves("EMA-5")
def test_targets_at_any_times_are_solved_together() -> None:
    """Each column equals that of a call with its target alone."""
    t_in, s_in = uniform(64)
    t_out, s_out = np.linspace(t_in[0], t_in[-1], 9), np.geomspace(0.02, 0.28, 9)
    together = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t_out, out_sigma_rel=s_out)
    for j, (t, length) in enumerate(zip(t_out, s_out, strict=True)):
        alone = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, out_time=t, out_sigma_rel=length)
        assert np.allclose(together[:, j], alone[:, 0], rtol=1e-9, atol=1e-9)
        assert not together[t_in > t, j].any()


@proves("EMA-5")
@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-13, 1e-11])
def test_near_duplicates_give_the_least_norm(apart: float) -> None:
    """Profiles that float64 cannot distinguish share a coefficient; coefficients of near ones do not grow."""
    t_in, s_in = uniform(64)
    late = t_in * (1 - apart * np.random.default_rng(0).random(len(t_in)))
    target: Any = {"out_time": t_in[-1], "out_sigma_rel": [0.02, 0.07, 0.2]}
    single = ema.coefficients(in_time=t_in, in_sigma_rel=s_in, **target)
    twice: Any = {"in_time": np.concatenate([t_in, late]), "in_sigma_rel": np.tile(s_in, 2), **target}
    double = ema.coefficients(**twice)
    norm, alone = np.linalg.norm(double, axis=0), np.linalg.norm(single, axis=0)
    assert (norm > (1 - 1e-5) * alone / np.sqrt(2)).all()
    assert (norm < (1 + 1e-5) * alone / np.sqrt(2) if apart < 1e-14 else norm < 1.01 * alone).all()
    error = ema.reconstruction_error(in_time=t_in, in_sigma_rel=s_in, **target)
    assert np.allclose(ema.reconstruction_error(**twice).profile, error.profile, rtol=1e-5)


@proves("EMA-9")
@given(st.floats(0.1, 1), st.floats(1e-4, 3), st.floats(0.02, ema.LONGEST), st.booleans())
def test_products_with_traditional_averages(ratio: float, half_life: float, s: float, late: bool) -> None:
    """An exponential and a power function, either ending first. Oracle: mpmath's quadrature."""
    a = Profile.traditional(1.0 if late else ratio, half_life)
    b = Profile.power(ratio if late else 1.0, s)
    with mpmath.workdps(30):
        gamma, rate = mpmath.mpf(float(b.gamma)), mpmath.log(2) / mpmath.mpf(half_life)
        t_a, t_b = mpmath.mpf(float(a.time)), mpmath.mpf(float(b.time))

        def product(u: Any) -> Any:
            exponential = mpmath.exp(-rate * (t_a - u)) * rate / (1 - mpmath.exp(-rate * t_a))
            return exponential * (gamma + 1) * u**gamma / t_b ** (gamma + 1)

        end = min(t_a, t_b)
        steps = [end * (1 - mpmath.mpf(2) ** -k) for k in range(18)]
        wanted = float(mpmath.quad(product, [*steps, end]))
    # an exponent of rate (t_b - t_a) carries eps times itself; e^-40 of the norms is negligible
    assert float(a @ b) == pytest.approx(wanted, rel=1e-11, abs=1e-16 * float((a @ a) * (b @ b)) ** 0.5)


@proves("EMA-9")
@given(st.floats(0.1, 1), st.floats(0.01, 2), st.floats(0.01, 2))
def test_products_of_traditional_averages(ratio: float, one: float, other: float) -> None:
    """Oracle: the closed form."""
    k, m = np.log(2) / one, np.log(2) / other
    wanted = k * m / (k + m) * np.exp(-m * (1 - ratio)) * -np.expm1(-(k + m) * ratio)
    wanted /= -np.expm1(-k * ratio) * -np.expm1(-m)
    got = float(Profile.traditional(ratio, one) @ Profile.traditional(1.0, other))
    assert got == pytest.approx(wanted, rel=1e-12)


@proves("EMA-9")
def test_traditional_and_raw_checkpoints_are_rebuilt_from() -> None:
    """Weights of a random walk; a decay of 0.98 per step, or none, kept every 10 steps.

    The error measured is that of white noise's prediction for white noise, and within Cauchy-Schwarz for the walk.
    """
    steps, parameters, every = 640, 500, 10
    moves = np.random.default_rng(0).standard_normal((steps, parameters))
    edges, t_in = np.arange(steps + 1.0), np.arange(every, steps + 1.0, every)
    for decay, length in ((0.98, Length.half_life(np.log(2) / -np.log(0.98))), (0.0, Length.raw(1.0))):
        options: Any = {"in_time": t_in, "in_sigma_rel": [length] * len(t_in)}
        options |= {"out_time": float(steps), "out_sigma_rel": [0.1, 0.2]}
        c, predicted = ema.coefficients(**options), ema.reconstruction_error(**options)
        assert np.allclose(c.sum(axis=0), 1)
        for weights in (moves, np.cumsum(moves, axis=0)):
            average, stored = weights[0], []
            for step, w in enumerate(weights, 1):
                average = w if step == 1 else decay * average + (1 - decay) * w
                if step % every == 0:
                    stored.append(average)
            for j, s in enumerate(options["out_sigma_rel"]):
                error = np.linalg.norm(c[:, j] @ np.stack(stored) - track(weights, edges, s)[-1])
                norm = float(Profile.power(steps, s) @ Profile.power(steps, s)) ** 0.5
                bound = predicted.profile[j] * norm * np.linalg.norm(weights)
                if weights is moves:  # white noise: exact but for what happens within a step, and for chance
                    assert error == pytest.approx(bound / np.sqrt(steps), rel=0.15)
                assert error < bound


@proves("EMA-8")
@pytest.mark.parametrize(("files", "worst"), [(16, 0.52), (32, 0.36), (64, 0.17), (128, 0.058), (512, 0.0041)])
def test_errors_of_uniform_snapshots_are_the_published_solvers(files: int, worst: float) -> None:
    """The errors of the official solver for lengths from 0.01 to 0.25; the shortest length has the largest."""
    t_in, s_in = uniform(files)
    s_out = [0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25]
    error = ema.reconstruction_error(in_time=t_in, in_sigma_rel=s_in, out_time=t_in[-1], out_sigma_rel=s_out)
    assert error.profile.max() == error.profile[0] == pytest.approx(worst, rel=0.03)  # two digits


@proves("EMA-8")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_errors_are_what_tracked_averages_of_a_random_walk_show(dtype: str) -> None:
    """Cauchy-Schwarz bounds the error of the average; rounding in storage is amplified as predicted.

    Rounding to nearest is uniform within eps / 2 of a number's power of 2: its rms is eps |x| / sqrt(12), times
    between 1/2 and 1 for where x lies.
    """
    steps, parameters = 512, 4000
    weights = np.cumsum(np.random.default_rng(1).standard_normal((steps, parameters)), axis=0)
    edges = np.arange(steps + 1.0)
    t_in, s_in = np.repeat(np.arange(16.0, steps + 1, 16), 2), np.tile([0.05, 0.10], 32)
    histories = {s: track(weights, edges, s) for s in (0.05, 0.10)}
    stored = np.stack([histories[s][int(t) - 1] for t, s in zip(t_in, s_in, strict=True)])
    options: Any = {"in_time": t_in, "in_sigma_rel": s_in, "out_time": float(steps), "out_sigma_rel": [0.02, 0.15]}
    c, predicted = ema.coefficients(**options), ema.reconstruction_error(**options, dtype=dtype)
    assert np.allclose(predicted.amplification, np.linalg.norm(c, axis=0))
    assert np.allclose(predicted.rounding, predicted.amplification * tolerance.eps(dtype))
    assert np.allclose(predicted.total, predicted.profile + predicted.rounding)
    for j, s in enumerate(options["out_sigma_rel"]):
        exact = c[:, j] @ stored
        norm = float(Profile.power(steps, s) @ Profile.power(steps, s)) ** 0.5
        assert np.linalg.norm(exact - track(weights, edges, s)[-1]) < predicted.profile[j] * norm * np.linalg.norm(
            weights
        )
        rounded = np.linalg.norm(c[:, j] @ stored.astype(dtype).astype(np.float64) - exact)
        size = np.linalg.norm(c[:, j : j + 1] * stored) / np.linalg.norm(c[:, j])  # rms of what is rounded
        assert 0.5 < rounded / (predicted.rounding[j] * size / np.sqrt(12)) < 1


@proves("EMA-8")
@given(snapshots(), st.floats(0.03, 0.28))
def test_the_reconstructed_profile_is_the_sum_of_stored_ones(stored: tuple[np.ndarray, np.ndarray], s: float) -> None:
    """Its distance from the target profile, on a fine grid, is the predicted error."""
    t_in, s_in = stored
    target: Any = {"in_time": t_in, "in_sigma_rel": s_in, "out_time": t_in[-1], "out_sigma_rel": s}
    t = (np.arange(20000) + 0.5) / 20000 * t_in[-1]
    made = ema.reconstructed_profile(t, **target)[0]
    summed = sum(
        c * ema.profile(t, end_time=end, sigma_rel=length)
        for c, end, length in zip(ema.coefficients(**target)[:, 0], t_in, s_in, strict=True)
    )
    assert np.allclose(made, summed, rtol=1e-9, atol=1e-9 * np.abs(made).max())
    wanted = ema.profile(t, end_time=t_in[-1], sigma_rel=s)
    distance = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert distance == pytest.approx(float(ema.reconstruction_error(**target).profile[0]), rel=0.02, abs=1e-6)


@proves("API-4", "EMA-8")
def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(InputError, match="dtype must be one of float16, bfloat16, float32, got 'int8'"):
        ema.reconstruction_error(in_time=1, in_sigma_rel=0.1, out_time=1, out_sigma_rel=0.1, dtype="int8")


@proves("EMA-10")
@pytest.mark.parametrize("files", [16, 32, 64])
def test_plans_beat_four_times_as_many_uniform_files(files: int) -> None:
    """At lengths for which the plan was not optimized."""
    plan = ema.plan_snapshots(files=files, sigma_rel_range=(0.015, 0.25), duration=2**31, batch=2048)
    assert isinstance(plan, ema.TimedPlan)
    wanted, usual = np.geomspace(0.015, 0.25, 61), ema.uniform_plan(files=4 * files, duration=2**31)
    assert plan.files <= files
    assert plan.error(wanted).total.max() < usual.error(wanted).total.max()
    due = [plan.due(now - 2048 * 997, now) for now in range(2048 * 997, 2**31 + 2048 * 997, 2048 * 997)]
    assert sum(map(len, due)) <= plan.files == sum(len(plan.due(t - 1, t)) for t in sorted(set(sum(plan.times, ()))))
