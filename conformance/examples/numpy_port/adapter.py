"""What docs/adding_a_port.md asks for, on NumPy: two members of the seven."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edm2_core import reference, sampler
from edm2_core.network import NetworkConfig

Params = Mapping[str, np.ndarray]


class NumpyPort:
    name, library, version = "numpy_port", "numpy", "1"

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        denoised, logvar = reference.denoise(config, wide(params), wide(x), wide(sigma), wide(labels))
        return denoised.astype(np.float32), logvar.astype(np.float32)

    def sample(
        self,
        config: NetworkConfig,
        params: Params,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        guide: Params | tuple[NetworkConfig, Params] | None = None,
        guidance: float = 1.0,
        churn_noise: Iterable[np.ndarray] | None = None,
        **steps: Any,
    ) -> np.ndarray:
        net = denoiser(config, params, labels)
        other, weights = (config, guide or params) if guide is None or isinstance(guide, Mapping) else guide
        away = denoiser(other, weights, labels if guide is not None else None)
        churn = None if churn_noise is None else map(wide, churn_noise)
        run = sampler.guided(net, away, guidance=guidance)
        return sampler.sample(run, wide(noise), churn_noise=churn, **steps).astype(np.float32)


def denoiser(config: NetworkConfig, params: Params, labels: np.ndarray | None) -> sampler.Denoiser:
    weights, given = wide(params), wide(labels) if config.label_dim else None
    return lambda x, sigma: reference.denoise(config, weights, x, np.full((len(x), 1, 1, 1), sigma), given)[0]


def wide(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: wide(value) for name, value in values.items()}
    return None if values is None else np.asarray(values, np.float64)


PORT = NumpyPort()
