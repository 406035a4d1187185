"""A word of warning where this machine computes a narrow precision much more slowly than float32."""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from edm2_core.network import initialize
from edm2_core.presets import preset

_MUCH = 3.0  # times as long as float32


def say_if_slow(port: Any, precision: str, /) -> None:
    """Print a line if ``port``, a dataclass with a field ``precision``, computes a small network in ``precision`` much
    more slowly than in float32, as CPUs without hardware for it do. Float32 is not measured."""
    if precision != "float32":
        slower = _seconds(replace(port, precision=precision)) / _seconds(replace(port, precision="float32"))
        if slower > _MUCH:
            print(f"note     {precision} takes {slower:.0f} times as long as float32 here: leave out --precision")


def _seconds(port: Any) -> float:
    """The shortest of three forward passes, after one in which what is compiled is."""
    config = replace(preset("digits").network, img_resolution=16, model_channels=64, channels_per_head=64)
    params = initialize(config, seed=0)
    x, sigma = np.ones((4, 1, 16, 16), np.float32), np.ones((4, 1, 1, 1), np.float32)
    port.denoise(config, params, x, sigma)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        port.denoise(config, params, x, sigma)
        times.append(time.perf_counter() - start)
    return min(times)
