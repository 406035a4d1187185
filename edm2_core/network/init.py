"""Initial parameters of a network: the same float32 arrays in every port."""

from math import sqrt
from zlib import crc32

import numpy as np

from .config import NetworkConfig
from .unet import Parameter, plan


def initialize(config: NetworkConfig, /, *, seed: int) -> dict[str, np.ndarray]:
    """Initial parameters as float32 NumPy arrays by canonical name, of the shapes in ``plan(config).parameters``.

    They are the same in every port: each array depends on ``seed`` and its name alone.

    Weights are N(0, 1) (Appendix B.4), or He's uniform +-sqrt(6 / fan-in) with biases alike (Appendix B.1). Gains are 0
    and scales of group norms 1. Frequencies are 2 pi N(0, 1) and phases 2 pi U(0, 1) (Eqs. 35-36). Those of the
    positional embedding are 10000^(-i / n), i < n = channels / 2, once for cosines and once for sines. Departs from the
    paper: it states no bound for He's uniform.
    """

    def draw(name: str, parameter: Parameter) -> np.ndarray:
        key = np.array([seed, crc32(name.encode())], np.uint64)  # a list of both becomes floats from 2^63 on
        generator = np.random.Generator(np.random.Philox(key=key))
        (shape, turn), single = (parameter.shape, np.float32(2 * np.pi)), np.float32
        half = shape[0] // 2 + shape[0] % 2 if shape else 0
        match parameter.init:
            case "normal":
                return generator.standard_normal(shape, dtype=single)
            case "he":
                bound = single(sqrt(6 / parameter.fan_in))
                return bound * (2 * generator.random(shape, dtype=single) - 1)
            case "zeros":
                return np.zeros(shape, single)
            case "ones":
                return np.ones(shape, single)
            case "frequencies":
                return turn * generator.standard_normal(shape, dtype=single)
            case "phases":
                return turn * generator.random(shape, dtype=single)
            case "positions":
                return np.resize(10000.0 ** -(np.arange(half) / half), shape).astype(single)
            case "quadratures":
                return np.repeat([0, -np.pi / 2], half)[: shape[0]].astype(single)

    return {name: draw(name, parameter) for name, parameter in plan(config).parameters.items()}
