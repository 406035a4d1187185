"""Tolerances with their derivations: each is constant x eps(dtype) x growth.

One rounding changes a value by at most eps / 2, relative (eps is the distance from 1 to the next number). Library
functions (exp, log, cos, sqrt, power) are accurate to 2 eps. Bounds on networks are relative to the Frobenius norm, and
hold where no pixel or head is nearly zero before it is normalized; :mod:`.ill_conditioned` treats the others.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from edm2_core.network import NetworkConfig, plan

_BITS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}


def eps(dtype: str) -> float:
    """The distance from 1 to the next number."""
    return 2.0 ** -_BITS[dtype]


TINY = 2.0**-126  # float32's smallest normal number: libraries may flush smaller ones to zero


def reduction(n: int) -> float:
    """Growth of a sum of ``n`` terms, in eps of the sum of magnitudes.

    Each of n additions rounds by at most eps / 2 of the partial sum, with random sign: sqrt(n) / 2 in all, doubled as a
    margin. Sums in blocks or trees round less.
    """
    return sqrt(n)


def layers(config: NetworkConfig) -> int:
    """Layers on the longest path: two convolutions and a skip's per block, three products where it attends."""
    walk = plan(config)
    return 4 + sum(3 + 3 * bool(block.heads) for block in (*walk.encoder, *walk.decoder))


def network(config: NetworkConfig, dtype: str = "float32") -> float:
    """Relative error of a forward pass: eps (4 layers + 8).

    A layer rounds its normalized weight, its products and its nonlinearity: about four roundings of random sign per
    output, relative to the output's magnitude. Magnitudes stay at 1, so errors add up and are not amplified. The
    Fourier features add eps times the angle 2 pi N(0, 1) ln(sigma) / 4, whose rms is below 8.
    """
    return eps(dtype) * (4 * layers(config) + 8)


def residual(sigma: np.ndarray, images: np.ndarray, sigma_data: float) -> float:
    """Condition of D - y: magnitudes |y| and sigma cancel down to c_out, the magnitude of the network's output."""
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    return float(np.max((np.abs(images).max(axis=(1, 2, 3), keepdims=True) + sigma) / c_out))


def gradient(config: NetworkConfig, sigma: np.ndarray, images: np.ndarray, dtype: str = "float32") -> float:
    """Relative error of loss and gradients: 4 x network + 4 eps x condition of the residual.

    The backward pass is as deep as the forward pass and multiplies by activations that carry the forward error: 2 + 1
    passes, and one for the square of the residual. Magnitudes hold backward only on average: the norm is bounded.
    """
    return 4 * network(config, dtype) + 4 * eps(dtype) * residual(sigma, images, config.sigma_data)


STEP = eps("float64") ** (1 / 3)


def difference(config: NetworkConfig) -> float:
    """Error of a central difference of the float64 reference over :data:`STEP`, relative to the value's magnitude.

    Both sides round by network(float64), of random sign: sqrt(2) of it over 2 steps. The third derivative adds
    step^2 / 6 = 6e-12 of itself, as much at the step eps^(1/3) where it is as large as the value. Along a direction
    that moves the network's input, or its weights, by as much as they are, a pixel norm of rms r makes it 1 / r^2 of
    the first: less than a tenth of network(float32) while r > 0.003.
    """
    return network(config, "float64") / (sqrt(2) * STEP)


def gradient_floor(wanted: Mapping[str, np.ndarray]) -> float:
    """Norm below which one tensor's gradient is compared absolutely: the tensors' root mean square.

    A smaller gradient is the rest of sums that cancel and are as large as its neighbours', and so is its rounding. The
    extreme is a row with a single element, whose gradient the normalization cancels completely.
    """
    return sqrt(sum(float(np.sum(g**2)) for g in wanted.values()) / len(wanted))


def gradient_elsewhere(weights: Mapping[str, np.ndarray], slack: Mapping[str, np.ndarray]) -> float:
    """Relative error of a gradient taken at ``weights`` of which each element may be off by its ``slack``.

    Rounding is far less than what an element of gradient zero adds: Adam's first step moves it by the learning rate,
    in a direction that is free. It enters in the forward pass and in the backward pass.
    """
    off, whole = (sum(float(np.sum(a[name] ** 2)) for name in slack) for a in (slack, weights))
    return 2 * sqrt(off / whole)


def sampled(config: NetworkConfig, *, evaluations: int, gain: float, guidance: float = 1.0) -> float:
    """Relative error of a sample, of at most ``evaluations`` calls of networks with output gain ``gain``.

    dx/dln(sigma) = x - D, so an error grows at rate c_skip - 1 + c_out c_in F' <= sigma sd / (sigma^2 + sd^2) |F'|,
    which integrates over all ln(sigma) to |F'| pi / 2. F' is the output gain, and guidance w makes it
    (|w| + |w - 1|) times as large. Every evaluation's error counts in full.
    """
    lipschitz = gain * (abs(guidance) + abs(guidance - 1))
    return network(config) * sqrt(evaluations) * float(np.exp(np.pi / 2 * lipschitz))


def adam(gradient: np.ndarray, root: np.ndarray, *, lr: float, error: float) -> np.ndarray:
    """How far one step of Adam may be off, element by element: lr x the error of m / (sqrt(v) + 1e-8).

    ``error`` is that of the gradient in Frobenius norm, spread evenly over its elements, of which each may be off by
    three times as much: the few whose root is smallest make up most of the sum, so it does not average over many.
    Divided by ``root``, the step's sqrt(v) + 1e-8, twice since m and v both carry it, and no more than 2: where the
    gradient is smaller than its error (exactly zero, for the queries of a single pixel), the sign of the step is free.
    """
    return lr * np.minimum(2.0, 2 * 3 * error / sqrt(max(gradient.size, 1)) / root)


def mean_square(samples: int, *, kurtosis: float = 3.0) -> float:
    """6 standard errors of a mean square of ``samples`` independent values of variance 1: the square's variance is
    kurtosis - 1. One true statement in 5e8 fails."""
    return 6 * sqrt((kurtosis - 1) / samples)


def gram_condition(gram: np.ndarray) -> float:
    """Condition of a Gram matrix scaled to a unit diagonal, which a least-squares fit through it amplifies eps by."""
    scale = np.diagonal(gram) ** -0.5
    return float(np.linalg.cond(gram * np.outer(scale, scale)))


def relative(got: Any, wanted: Any, floor: float = 0.0) -> float:
    """Frobenius norm of the difference over that of ``wanted``, or over ``floor`` if that is larger."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, f"wanted shape {wanted.shape}, got {got.shape}"
    norm = max(float(np.linalg.norm(wanted.ravel())), floor)
    return float(np.linalg.norm((got - wanted).ravel())) / norm if norm else float(np.abs(got).max(initial=0))


def relative_all(got: Mapping[str, Any], wanted: Mapping[str, Any], floor: float = 0.0) -> tuple[float, str]:
    """The largest :func:`relative` among named arrays, with its name. The names must be the same."""
    assert set(got) == set(wanted), f"names that only one side has: {sorted(set(got) ^ set(wanted))[:4]}"
    return max((relative(got[name], wanted[name], floor), name) for name in wanted)
