"""What every port's adapter does alike, around its own denoiser and step."""

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

import numpy as np

from edm2_core.network import NetworkConfig

Params = Mapping[str, np.ndarray]
Guide = Params | tuple[NetworkConfig, Params]


class Sampling:
    """``sample``, for a port that has a ``sampler``."""

    def sampler(self, config: NetworkConfig, params: Params, *, guide: Guide | None = None) -> Any:
        raise TypeError("a port must have a sampler of its own")

    def sample(
        self,
        config: NetworkConfig,
        params: Params,
        noise: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        guide: Guide | None = None,
        guidance: float = 1.0,
        guide_interval: tuple[float, float] = (0.0, inf),
        churn_noise: Iterable[np.ndarray] | None = None,
        **steps: Any,
    ) -> np.ndarray:
        """Images from ``noise``. ``steps`` are :func:`edm2_core.sampler.sample`'s num_steps, sigma_min and so on.

        ``guide`` is the parameters of a network of the same config, or (config, parameters) of another; None with
        guidance other than 1 is the network itself without its label.
        """
        return self.sampler(config, params, guide=guide)(
            noise, labels, guidance=guidance, guide_interval=guide_interval, churn_noise=churn_noise, **steps
        )
