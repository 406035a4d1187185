"""A run's log and telemetry as the report reads them: thinned without losing extremes, whatever the lines hold."""

import numpy as np
import pytest
from report_runs import COLUMNS, measurement
from toy_port import config_of

from backends.pipeline.report import sections
from backends.pipeline.report.history import POINTS, Curve, History, thin
from backends.pipeline.report.lines import limits
from backends.pipeline.runs.folder import Run


@pytest.fixture
def run(toy):
    """With a line of log and of telemetry every 256 images."""
    run = Run(toy)
    run.save_config(config_of(preset="toy", data="digits"))
    for nimg in range(0, 4096, 256):
        run.append_telemetry(measurement(nimg))
        run.append_log({"nimg": nimg + 256, "loss": 1.0, "lr": 0.1, "images_per_s": 9.0, "nonfinite": 0})
    return run


def test_thinning_keeps_extremes_and_where_they_were():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[61_803], y[31_415], y[50_000] = 9.0, -7.0, np.nan
    curve = thin(x, y)
    assert len(curve.x) == POINTS
    assert curve.thinned
    width = len(x) / POINTS
    assert curve.high.max() == 9
    assert abs(curve.x[curve.high.argmax()] - 61_803) <= width
    assert curve.low.min() == -7
    assert abs(curve.x[curve.low.argmin()] - 31_415) <= width
    assert curve.mean.max() == pytest.approx(9 / width, rel=0.01)
    assert np.isfinite(curve.mean).all()


def test_a_short_curve_is_not_thinned_and_a_gap_stays_a_gap():
    y = np.array([1.0, np.nan, 3.0])
    curve = thin(np.arange(3.0), y)
    assert not curve.thinned
    assert np.array_equal(curve.mean, y, equal_nan=True)
    gap = thin(np.arange(1000.0), np.where(np.arange(1000) < 500, np.nan, 1.0))
    assert np.isnan(gap.mean[: POINTS // 2]).all()
    assert np.isnan(gap.high[0])
    assert (gap.mean[POINTS // 2 :] == 1).all()


def test_maxima_are_over_blocks_and_means_too_and_noise_is_weighed_by_images(run):
    run.telemetry_path.unlink()
    two = {"unet.enc.8x8_block0": ("enc", 8), "unet.enc.8x8_block1": ("enc", 8), "unet.dec.4x4_in0": ("dec", 4)}
    for nimg, value, count in ((0, 1.0, 1), (64, 3.0, 3)):
        line = measurement(nimg, value=value, blocks=two)
        line["blocks"]["unet.enc.8x8_block1"] |= dict.fromkeys(COLUMNS, 10 * value)
        line["noise"]["count"] = [count, 0, 0]
        run.append_telemetry(line)
    telemetry = History.of(run).telemetry
    encoder, decoder = telemetry.magnitudes["activation_max"]
    assert (str(encoder), str(decoder)) == ("Enc 8x8", "Dec 4x4")
    assert telemetry.magnitudes["activation_max"][encoder].tolist() == [10, 30]
    assert telemetry.magnitudes["update"][encoder].tolist() == [5.5, 16.5]
    ((part, loss, u),) = telemetry.parts(1)
    assert part == "0-100%"
    assert loss[0] == (1 * 1.0 + 3 * 3.0) / 4
    assert u[0] == 0.5
    assert np.isnan(loss[1:]).all()


def test_a_line_that_a_killed_run_left_torn_is_left_out(run):
    before = History.of(run)
    for path in (run.log_path, run.telemetry_path):
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"nimg": 4160, "blo')
    after = History.of(run)
    assert np.array_equal(before.log["nimg"], after.log["nimg"])
    assert np.array_equal(before.telemetry.nimg, after.telemetry.nimg)


@pytest.mark.parametrize(
    "line",
    [
        {"nimg": 4160},
        {"nimg": 4160, "blocks": None, "noise": {}},
        measurement(4160, blocks={"other": ("enc", 8)}),
        measurement(4160) | {"noise": {"sigma": [1.0], "loss": [1.0], "u": [1.0], "count": [1]}},
    ],
)
def test_a_measurement_of_another_shape_is_left_out(run, line):
    before = len(History.of(run).telemetry.nimg)
    run.append_telemetry(line)
    assert len(History.of(run).telemetry.nimg) == before


def test_what_was_not_finite_is_a_gap_and_is_counted(run):
    run.append_log({"nimg": 4160, "loss": float("nan"), "lr": 0.1, "images_per_s": 1.0, "nonfinite": 7})
    history = History.of(run)
    assert "7 gradients were not finite, and taken as 0" in sections.summary({"run": history})
    assert np.isnan(history.log["loss"][-1])


def test_a_logarithmic_axis_begins_at_a_number_of_one_digit():
    for values in ([1.9, 20.0], [0.3, 0.31], [0.00124, 5.0]):
        y = np.array(values)
        low, high = limits([Curve(x=np.arange(2.0), mean=y, low=y, high=y)])
        assert low <= y.min()
        assert high >= y.max()
        assert low == pytest.approx(float(f"{low:.0e}"))
        assert high >= 2 * low
