"""What docs/adding_a_port.md asks for, on NumPy: two members of the seven."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edm2_core import reference, sampler
from edm2_core.network import NetworkConfig

Params = Mapping[str, np.ndarray]


class NumpyPort:
    name, library, version = "numpy_port", "numpy", "1"
    dtype: Any = np.float64  # of its arithmetic

    def denoise(
        self, config: NetworkConfig, params: Params, x: np.ndarray, sigma: np.ndarray, *rest: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        denoised, logvar = reference.denoise(config, *(self.cast(given) for given in (params, x, sigma, *rest)))
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
        condition: np.ndarray | None = None,
        churn_noise: Iterable[np.ndarray] | None = None,
        **steps: Any,
    ) -> np.ndarray:
        net = self.denoiser(config, params, labels, condition)
        other, weights = (config, guide or params) if guide is None or isinstance(guide, Mapping) else guide
        away = self.denoiser(other, weights, labels if guide is not None else None, condition)
        churn = None if churn_noise is None else map(self.cast, churn_noise)
        run = sampler.guided(net, away, guidance=guidance)
        return sampler.sample(run, self.cast(noise), churn_noise=churn, **steps).astype(np.float32)

    def denoiser(
        self, config: NetworkConfig, params: Params, labels: np.ndarray | None, condition: np.ndarray | None
    ) -> sampler.Denoiser:
        weights = self.cast(params)
        given = self.cast(labels if config.label_dim else None), self.cast(condition if config.cond_channels else None)

        def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
            return reference.denoise(config, weights, x, np.full((len(x), 1, 1, 1), sigma, self.dtype), *given)[0]

        return denoise

    def cast(self, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {name: self.cast(value) for name, value in values.items()}
        return None if values is None else np.asarray(values, self.dtype)


PORT = NumpyPort()
