"""What is a network doing while it learns? Magnitudes of a step by block, and its losses by noise level.

A port measures; here its numbers become a line of telemetry.jsonl. The magnitude of a feature is the root mean square
of its elements: of an output's pixels in one image, of the row of a weight, of the row of its gradient. Source: arXiv
2312.02696 Eq. 3 and Appendix A.6, where activations are averaged over images before features are compared; here the
maximum is over both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edm2_core.network import NetworkConfig, plan

from .config import Settings

BINS = 16  # of ln(sigma), over three standard deviations on either side; what lies beyond is counted in the last ones


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A step as a port measures it. By weight, each a row of two: ``activations``, what its layer puts out, before any
    nonlinearity, bias and gain included; ``weights`` and ``gradients``: maximum and mean of magnitudes over features.
    ``updates``: the norms of the step it takes and of the weight. By image, [N]: ``sigma``; ``loss``, lambda(sigma)
    times the mean square error; ``u``, the learned uncertainty, or None.

    Of several processes each measures its own images. Dropout is left out.
    """

    activations: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    updates: Mapping[str, np.ndarray]
    sigma: np.ndarray
    loss: np.ndarray
    u: np.ndarray | None


def watched(config: NetworkConfig, /) -> dict[str, list[str]]:
    """The weights of each block, by its name: of its convolutions, its attention and its conditioning."""
    walk = plan(config)
    weights = [name for name, parameter in walk.parameters.items() if parameter.kind == "weight"]
    return {
        block.name: [name for name in weights if name.startswith(f"{block.name}.")]
        for block in (*walk.encoder, *walk.decoder)
    }


def record(settings: Settings, measured: Measurement, /, *, nimg: int) -> dict[str, Any]:
    """A line of telemetry.jsonl: ``nimg`` as the step began; ``blocks``, each with role, resolution, the maximum and
    mean of its activations, weights and gradients and its relative update; ``noise``, by bin of noise level."""
    walk = plan(settings.network)
    blocks = {block.name: block for block in (*walk.encoder, *walk.decoder)}
    return {
        "nimg": nimg,
        "blocks": {
            name: {
                "role": "dec" if blocks[name].role == "dec" else "enc",
                "resolution": blocks[name].resolution,
                **_magnitudes(settings.network, measured, weights),
            }
            for name, weights in watched(settings.network).items()
        },
        "noise": _by_noise(measured, settings.P_mean, settings.P_std),
    }


def _magnitudes(config: NetworkConfig, measured: Measurement, names: list[str]) -> dict[str, float]:
    features = [plan(config).parameters[name].shape[0] for name in names]
    found = {}
    for kind in ("activation", "weight", "gradient"):
        rows = np.array([getattr(measured, f"{kind}s")[name] for name in names], np.float64)
        found[f"{kind}_max"] = float(rows[:, 0].max())
        found[f"{kind}_mean"] = float(np.average(rows[:, 1], weights=features))
    moved, size = np.sqrt(np.sum(np.square([measured.updates[name] for name in names], dtype=np.float64), axis=0))
    return found | {"update": float(moved / size) if size else float("nan")}


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
