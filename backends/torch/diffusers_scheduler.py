"""EDM's sampler as a scheduler of diffusers, for loops of one's own. :class:`.diffusers_pipeline.EDM2Pipeline` takes
its settings from it.

    scheduler.set_timesteps(32)
    x = noise * scheduler.init_noise_sigma
    for sigma in scheduler.timesteps:                     # 63 of them: Heun's steps evaluate the network twice
        denoised, _ = model(x, sigma.expand(len(x), 1, 1, 1), labels)
        x = scheduler.step(denoised, sigma, x).prev_sample
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from edm2_core.errors import InputError
from edm2_core.sampler import noise_levels


@dataclass
class EDM2SchedulerOutput(BaseOutput):
    """``prev_sample``: the images at the next noise level."""

    prev_sample: Tensor


class EDM2Scheduler(SchedulerMixin, ConfigMixin):
    """The steps of :func:`edm2_core.sampler.sample` without churn, one evaluation of the network at a time.

    Args:
        sigma_min, sigma_max, rho: as in :func:`edm2_core.sampler.noise_levels`.
        method: "heun", of second order, or "euler".
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        method: Literal["heun", "euler"] = "heun",
    ):
        self.order = 2 if method == "heun" else 1
        self.set_timesteps(32)

    @property
    def init_noise_sigma(self) -> float:
        """What standard normal noise is multiplied by."""
        return self._levels[0]

    def settings(self) -> dict[str, Any]:
        """Options of :func:`edm2_core.sampler.sample`."""
        return {name: getattr(self.config, name) for name in ("sigma_min", "sigma_max", "rho", "method")}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin a trajectory. ``timesteps`` are the noise levels that the network is evaluated at, in order.

        Raises:
            InputError: as :func:`edm2_core.sampler.noise_levels`.
        """
        c = self.config
        self._levels = noise_levels(num_inference_steps, sigma_min=c.sigma_min, sigma_max=c.sigma_max, rho=c.rho)
        self._calls: list[tuple[float, float, bool]] = []  # from, to, and whether it corrects the step before
        for level, target in pairwise(self._levels):
            self._calls.append((level, target, False))
            if target > 0 and self.order == 2:
                self._calls.append((level, target, True))
        at = [target if corrects else level for level, target, corrects in self._calls]
        self.timesteps = torch.tensor(at, dtype=torch.float32, device=device)
        self._done = 0
        self._start: tuple[Tensor, Tensor] | None = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample: the network scales its input by itself."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """The images at the next level, or Heun's guess of them, from the denoised ones at this.

        Args:
            model_output: the network's answer, denoised images, for ``sample``.
            timestep: of ``timesteps``; they are taken in order.
            sample: what the last step returned.

        Raises:
            InputError: more steps than ``timesteps``.
        """
        if self._done == len(self._calls):
            raise InputError(f"a trajectory must be of {self._done} steps, got one more: call set_timesteps again")
        level, target, corrects = self._calls[self._done]
        self._done += 1
        if corrects and self._start is not None:
            start, slope = self._start
            slope = (slope + (sample - model_output) / target) / 2
        else:
            start, slope = sample, (sample - model_output) / level
            self._start = start, slope
        moved = start + slope * (target - level)
        return EDM2SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        """The number of evaluations of the network."""
        return len(self._calls)
