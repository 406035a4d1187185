"""Telemetry of a training step as a line of telemetry.jsonl: magnitudes by block, losses by noise level.

A port makes the :class:`~backends.trainer.Measurement`. Source: arXiv 2312.02696 Eq. 3 and Appendix A.6. Departure: the
paper averages magnitudes over images and takes the maximum over features; here the maximum is over both.
"""

from typing import Any

import numpy as np

from backends.trainer import Measurement
from edm2_core.network import NetworkConfig, plan

from .config import TrainConfig

BINS = 16  # of ln(sigma), over three standard deviations on either side; the outer bins include everything beyond


def watched(config: NetworkConfig, /) -> dict[str, list[str]]:
    """By name of the block, the names of its weights: of convolutions, attention and conditioning."""
    walk = plan(config)
    weights = [name for name, parameter in walk.parameters.items() if parameter.kind == "weight"]
    return {
        block.name: [name for name in weights if name.startswith(f"{block.name}.")]
        for block in (*walk.encoder, *walk.decoder)
    }


def record(config: TrainConfig, measured: Measurement, /, *, nimg: int) -> dict[str, Any]:
    """A line of telemetry.jsonl: ``nimg`` before the step; ``blocks``, each with role, height and width, maximum and
    mean of its activations, weights and gradients, and its relative update; ``noise``, losses by bin of noise level."""
    walk = plan(config.network)
    blocks = {block.name: block for block in (*walk.encoder, *walk.decoder)}
    return {
        "nimg": nimg,
        "blocks": {
            name: {
                "role": "dec" if blocks[name].role == "dec" else "enc",
                "size": blocks[name].size,
                **_magnitudes(config.network, measured, weights),
            }
            for name, weights in watched(config.network).items()
        },
        "noise": _by_noise(measured, config.hyper.P_mean, config.hyper.P_std),
    }


def _magnitudes(config: NetworkConfig, measured: Measurement, names: list[str]) -> dict[str, float]:
    features = [plan(config).parameters[name].shape[0] for name in names]
    magnitudes = {}
    for kind in ("activation", "weight", "gradient"):
        rows = np.array([getattr(measured, f"{kind}s")[name] for name in names], np.float64)
        magnitudes[f"{kind}_max"] = float(rows[:, 0].max())
        magnitudes[f"{kind}_mean"] = float(np.average(rows[:, 1], weights=features))
    update, size = np.sqrt(np.sum(np.square([measured.updates[name] for name in names], dtype=np.float64), axis=0))
    return magnitudes | {"update": float(update / size) if size else float("nan")}


def _by_noise(measured: Measurement, P_mean: float, P_std: float) -> dict[str, Any]:
    edges = np.linspace(P_mean - 3 * P_std, P_mean + 3 * P_std, BINS + 1)
    bins = np.clip(np.digitize(np.log(measured.sigma), edges) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)

    def mean(values: np.ndarray | None) -> list[float | None]:
        if values is None:
            return [None] * BINS
        sums = np.bincount(bins, weights=values, minlength=BINS)
        return [float(total / n) if n else None for total, n in zip(sums, count, strict=True)]

    centres = np.exp((edges[1:] + edges[:-1]) / 2)
    return {"sigma": centres.tolist(), "loss": mean(measured.loss), "u": mean(measured.u), "count": count.tolist()}
