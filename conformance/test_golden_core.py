"""edm2_core against the golden numbers: what the official implementation put out, in float32."""

from typing import Any

import numpy as np
import pytest

from conformance import golden, tolerance
from conformance.clauses import proves
from conformance.libraries import Library, each_library, to_numpy
from conformance.strategies import wide
from edm2_core import ema, mp, reference, sampler, schedule

pytestmark = golden.needs_golden
OPERATIONS, DENOISER, SAMPLES, COEFFICIENTS = 1e-6, 2e-6, 1e-4, 1e-8  # relative Frobenius norm, from the rules

FILTERS = {"box": (1, 1), "1331": (1, 3, 3, 1)}
OPS: dict[str, Any] = {
    "normalize_default": lambda a: mp.normalize(a["x"]),
    "pixel_norm": lambda a: mp.normalize(a["x"], axis=1),
    "mp_silu": lambda a: mp.mp_silu(a["x"]),
    "fourier_out": lambda a: mp.mp_fourier(a["fourier_in"], a["fourier_freqs"], a["fourier_phases"]),
    "linear_out": lambda a: reference.linear(a["linear_in"], a["linear_w"]),
}
for _t in (0.3, 0.5):
    OPS[f"mp_sum_t{_t}"] = lambda a, t=_t: mp.mp_sum(a["x"], a["y"], t=t)
    OPS[f"mp_cat_t{_t}"] = lambda a, t=_t: mp.mp_cat(a["x"], a["z"], axis=1, t=t)
for _mode in ("down", "up"):
    for _name, _taps in FILTERS.items():
        OPS[f"resample_{_mode}_{_name}"] = lambda a, m=_mode, f=_taps: mp.resample(a["x"], mode=m, filter=f)
for _c in ("conv_c3", "conv_c1"):
    OPS[f"{_c}_out"] = lambda a, c=_c: reference.conv(a["x"], a[f"{c}_w"])
    OPS[f"{_c}_out_gain0.7"] = lambda a, c=_c: reference.conv(a["x"], a[f"{c}_w"], gain=0.7)
    OPS[f"{_c}_w_forced"] = lambda a, c=_c: mp.force_weight_norm(a[f"{c}_w"])
INPUTS = {
    "x",
    "y",
    "z",
    "linear_in",
    "linear_w",
    "conv_c3_w",
    "conv_c1_w",
    "fourier_in",
    "fourier_freqs",
    "fourier_phases",
}


@proves("MP-1", "MP-2", "MP-3", "MP-4", "MP-5", "MP-6", "MP-8", "MP-9")
@each_library
@pytest.mark.parametrize("name", OPS)
def test_operation(library: Library, name: str) -> None:
    arrays = golden.arrays("ops")
    got = OPS[name]({key: library.array(arrays[key]) for key in INPUTS})
    assert tolerance.relative(to_numpy(got), arrays[name]) <= OPERATIONS


@proves("MP-1")
def test_every_operation_is_tested() -> None:
    """No array of the golden file is left out."""
    assert set(golden.arrays("ops")) == set(OPS) | INPUTS


@proves("EMA-1")
def test_gamma_and_sigma_rel() -> None:
    """To 1e-8: the official root finder is accurate to about 1e-9."""
    for s, gamma in golden.ema_lr()["sigma_rel_to_gamma"]:
        assert ema.sigma_rel_to_gamma(s) == pytest.approx(gamma, rel=1e-8, abs=1e-8)
    for gamma, s in golden.ema_lr()["gamma_to_sigma_rel"]:
        assert ema.gamma_to_sigma_rel(gamma) == pytest.approx(s, rel=1e-12)


@proves("EMA-3")
def test_beta() -> None:
    for row in golden.ema_lr()["beta"]:
        got = ema.beta(row["sigma_rel"], t_next=row["t_next"], t_delta=row["t_delta"])
        assert got == pytest.approx(row["beta"], rel=1e-8, abs=1e-15)


@proves("EMA-5")
@each_library
def test_coefficients(library: Library) -> None:
    """To 1e-8; in libraries that compute in float32, to the rounding of the result."""
    for row in golden.ema_lr()["posthoc"]:
        wanted = np.asarray(row["coefficients"])
        options: Any = {"in_time": row["in_nimg"], "out_time": row["out_nimg"], "out_sigma_rel": row["out_sigma_rel"]}
        exact = ema.coefficients(in_sigma_rel=row["in_sigma_rel"], **options)
        assert tolerance.relative(exact, wanted) <= COEFFICIENTS
        assert np.allclose(exact.sum(axis=0), 1, atol=1e-9)
        if library.name != "numpy" and library.device is None:  # by way of the host, as in test_libraries.py
            s = np.asarray(row["in_sigma_rel"], np.float32)
            got = ema.coefficients(in_sigma_rel=library.array(s), **options)
            same = ema.coefficients(in_sigma_rel=s.astype(np.float64), **options)
            assert tolerance.relative(to_numpy(got), same) <= tolerance.eps("float32")


@proves("LR-1")
def test_learning_rate() -> None:
    for row in golden.ema_lr()["lr"]:
        got = schedule.learning_rate(
            row["nimg"],
            batch=row["batch"],
            ref_lr=row["ref_lr"],
            ref_batches=row["ref_batches"],
            rampup_nimg=row["rampup_Mimg"] * 1e6,
        )
        assert got == pytest.approx(row["lr"], rel=1e-12)


@proves("NET-5")
@golden.each_network
def test_denoiser(case: str) -> None:
    """At mixed noise levels, without label, and at both ends of the schedule."""
    data = golden.arrays(case)
    config, params = golden.config(data), wide(golden.named(data, "param"))
    images, labels, sigma = (wide(data.get(name)) for name in ("images", "labels", "sigma"))
    noisy = images + wide(data["unit_noise"]) * sigma
    denoised, logvar = reference.denoise(config, params, noisy, sigma, labels)
    assert tolerance.relative(denoised, data["denoised"]) <= DENOISER
    assert tolerance.relative(logvar, data["logvar"]) <= DENOISER
    if labels is not None:
        without, _ = reference.denoise(config, params, noisy, sigma, None)
        assert tolerance.relative(without, data["denoised_nolabel"]) <= DENOISER
    for level in (0.002, 80.0):
        denoised, _ = reference.denoise(config, params, images, np.full_like(sigma, level), labels)
        assert tolerance.relative(denoised, data[f"denoised_sigma{level}"]) <= DENOISER


@proves("LOSS-1", "LOSS-3")
@golden.each_network
def test_loss(case: str) -> None:
    """To 1e-5, because the golden residual D - y was computed in float32."""
    data = golden.arrays(case)
    arguments = wide(tuple(data.get(name) for name in ("images", "unit_noise", "sigma", "labels")))
    loss = reference.loss(golden.config(data), wide(golden.named(data, "param")), *arguments)
    assert tolerance.relative(loss, data["loss"]) <= 1e-5
    assert tolerance.relative(np.exp(wide(data["rnd_normal"]) - 0.4), data["sigma"]) <= OPERATIONS


@proves("SAMPLE-2", "SAMPLE-4", "SAMPLE-5")
@golden.each_network
def test_samples(case: str) -> None:
    """edm2_core.sampler over edm2_core.reference, in float64."""
    data = golden.arrays(case)
    config, labels, noise = golden.config(data), wide(data.get("labels")), wide(data["sampler_noise"])

    def network(prefix: str) -> sampler.Denoiser:
        params = wide(golden.named(data, prefix))

        def denoise(x: Any, sigma: float) -> Any:
            return reference.denoise(config, params, x, np.full((len(x), 1, 1, 1), sigma), labels)[0]

        return denoise

    net = network("param")
    churned: Any = {"S_churn": 20, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    fresh = iter(wide(data["churn_noise"]))
    got = {
        "sample_18": sampler.sample(net, noise, num_steps=18),
        "sample_32_f64": sampler.sample(net, noise, num_steps=32),
        "sample_10_guided1.7": sampler.sample(sampler.guided(net, network("guide"), guidance=1.7), noise, num_steps=10),
        "sample_10_churn": sampler.sample(net, noise, num_steps=10, churn_noise=fresh, **churned),
    }
    assert len(list(fresh)) == len(data["churn_noise"]) - int(data["churn_noise_used"])
    for name, images in got.items():
        assert tolerance.relative(images, data[name]) <= SAMPLES, name
