"""Every port against numbers of the official implementation, through its PORT alone (SPEC NET, STEP, SAMPLE)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance import golden, tolerance
from conformance.ports import each_port
from conformance.strategies import Batch
from edm2_core.network import NetworkConfig

pytestmark = each_port
DENOISER, TRAINING, SAMPLES = 1e-5, 1e-4, 1e-4  # agreement with the golden numbers, relative Frobenius norm
Params = dict[str, np.ndarray]


def golden_case(case: str) -> tuple[Mapping[str, np.ndarray], NetworkConfig, Params, Batch]:
    data = golden.arrays(case)
    batch = Batch(data["images"], data["unit_noise"], data["sigma"], data.get("labels"))
    return data, golden.config(data), golden.named(data, "param"), batch


@golden.needs_golden
@golden.each_network
def test_golden_denoiser(port: Any, case: str) -> None:
    """NET-5 NET-8"""
    data, config, params, batch = golden_case(case)
    denoised, logvar = port.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    assert tolerance.relative(denoised, data["denoised"]) <= DENOISER
    assert tolerance.relative(logvar, data["logvar"]) <= DENOISER
    if batch.labels is not None:
        without, _ = port.denoise(config, params, batch.noisy, batch.sigma)
        assert tolerance.relative(without, data["denoised_nolabel"]) <= DENOISER
    for level in (0.002, 80.0):
        sigma = np.full_like(batch.sigma, level)
        denoised, _ = port.denoise(config, params, batch.images, sigma, batch.labels)
        assert tolerance.relative(denoised, data[f"denoised_sigma{level}"]) <= DENOISER


@golden.needs_golden
@golden.each_network
def test_golden_loss_and_gradients(port: Any, case: str) -> None:
    """LOSS-3 STEP-1"""
    data, config, params, batch = golden_case(case)
    loss, gradients = port.loss_and_gradients(config, params, *batch)
    wanted = golden.named(data, "grad")
    assert tolerance.relative(loss, data["loss"]) <= DENOISER
    worst, name = tolerance.relative_all(gradients, wanted)
    assert worst <= TRAINING, name


@golden.needs_golden
@golden.each_network
def test_golden_training(port: Any, case: str) -> None:
    """STEP-2 STEP-3: four steps."""
    data, config, params, batch = golden_case(case)
    losses, trained, averages = port.train(config, params, [batch] * 4, learning_rates=[0.01] * 4)
    assert tolerance.relative(losses, data["train_losses"]) <= DENOISER
    for name, got, prefix in (
        ("weights", trained, "trained"),
        ("average 0.05", averages[0.05], "ema0.05"),
        ("average 0.10", averages[0.10], "ema0.1"),
    ):
        worst, where = tolerance.relative_all(got, golden.named(data, prefix))
        assert worst <= TRAINING, f"{name}: {where}"


@golden.needs_golden
@golden.each_network
def test_golden_samples(port: Any, case: str) -> None:
    """SAMPLE-2 SAMPLE-4 SAMPLE-5"""
    data, config, params, batch = golden_case(case)
    churn = {"S_churn": 20, "S_min": 0.05, "S_max": 50, "S_noise": 1.003, "churn_noise": data["churn_noise"]}
    options: dict[str, dict[str, Any]] = {
        "sample_18": {"num_steps": 18},
        "sample_32_f64": {},
        "sample_10_guided1.7": {"num_steps": 10, "guide": golden.named(data, "guide"), "guidance": 1.7},
        "sample_10_churn": dict(num_steps=10, **churn),
    }
    for name, option in options.items():
        got = port.sample(config, params, data["sampler_noise"], batch.labels, **option)
        assert tolerance.relative(got, data[name]) <= SAMPLES, name
