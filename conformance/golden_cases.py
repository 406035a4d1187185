"""Cases that compare ports with numbers of the official implementation (NET, STEP, SAMPLE)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conformance import golden, measure
from conformance import strategies as draw
from conformance.contract import PortCase
from conformance.ports import Subject
from conformance.strategies import Batch
from edm2_core.network import NetworkConfig

DENOISER, TRAINING, SAMPLES = 1e-5, 1e-4, 1e-4  # agreement with the golden numbers, relative Frobenius norm
WHY = "agreement of float32 implementations with the golden numbers"
Params = dict[str, np.ndarray]


def _case(network: str) -> tuple[Mapping[str, np.ndarray], NetworkConfig, Params, Batch]:
    data = golden.arrays(network)
    batch = Batch(*(draw.frozen(data.get(name)) for name in ("images", "unit_noise", "sigma", "labels")))
    return data, golden.config(data), draw.frozen(golden.named(data, "param")), batch


def denoiser(port: Subject, network: str) -> None:
    data, config, params, batch = _case(network)
    denoised, logvar = port.denoise(config, params, batch.noisy, batch.sigma, batch.labels)
    measure.close(denoised, data["denoised"], DENOISER, what="the golden denoised images", why=WHY)
    measure.close(logvar, data["logvar"], DENOISER, what="the golden logvar", why=WHY)
    if batch.labels is not None:
        without, _ = port.denoise(config, params, batch.noisy, batch.sigma)
        measure.close(without, data["denoised_nolabel"], DENOISER, what="the golden images without label", why=WHY)
    for level in (0.002, 80.0):
        sigma = draw.frozen(np.full_like(batch.sigma, level))
        denoised, _ = port.denoise(config, params, batch.images, sigma, batch.labels)
        what = f"the golden images at sigma {level}"
        measure.close(denoised, data[f"denoised_sigma{level}"], DENOISER, what=what, why=WHY)


def gradients(port: Subject, network: str) -> None:
    data, config, params, batch = _case(network)
    loss, got = port.loss_and_gradients(config, params, *batch.arrays)
    measure.close(loss, data["loss"], DENOISER, what="the golden loss", why=WHY)
    measure.close_all(got, golden.named(data, "grad"), TRAINING, what="the golden gradient", why=WHY)


def training(port: Subject, network: str) -> None:
    """Four steps."""
    data, config, params, batch = _case(network)
    options: Any = {"learning_rates": [0.01] * 4, "betas": (0.9, 0.99), "sigma_rels": (0.05, 0.10)}
    losses, trained, averages = port.train(config, params, [batch.arrays] * 4, **options)
    losses = np.asarray(losses, np.float32)
    measure.close(losses, data["train_losses"], DENOISER, what="the golden losses of four steps", why=WHY)
    parts = {"trained": trained, "ema0.05": averages[0.05], "ema0.1": averages[0.10]}
    for prefix, got in parts.items():
        measure.close_all(got, golden.named(data, prefix), TRAINING, what=f"the golden {prefix} array", why=WHY)


def samples(port: Subject, network: str) -> None:
    data, config, params, batch = _case(network)
    churn = {"S_churn": 20, "S_min": 0.05, "S_max": 50, "S_noise": 1.003, "churn_noise": data["churn_noise"]}
    options: dict[str, dict[str, Any]] = {
        "sample_18": {"num_steps": 18},
        "sample_32_f64": {},
        "sample_10_guided1.7": {"num_steps": 10, "guide": golden.named(data, "guide"), "guidance": 1.7},
        "sample_10_churn": dict(num_steps=10, **churn),
    }
    for name, option in options.items():
        got = port.sample(config, params, data["sampler_noise"], batch.labels, **option)
        measure.close(got, data[name], SAMPLES, what=f"the golden {name}", why=WHY)


NETWORK = {"network": st.sampled_from(golden.NETWORKS)}
ORACLE = "the official implementation's numbers"

CASES = tuple(
    PortCase(f"golden-{name}", clauses, NETWORK, check, ORACLE, f"{allowed:g}", member, golden=True)
    for name, clauses, check, allowed, member in (
        ("denoiser", ("NET-5", "NET-8"), denoiser, DENOISER, "denoise"),
        ("gradients", ("LOSS-3", "STEP-1"), gradients, TRAINING, "loss_and_gradients"),
        ("training", ("STEP-2", "STEP-3", "EMA-3"), training, TRAINING, "train"),
        ("samples", ("SAMPLE-2", "SAMPLE-4", "SAMPLE-5"), samples, SAMPLES, "sample"),
    )
)
