"""Hypothesis strategies: arrays without subnormals, small configs, parameters and batches.

Large arrays come from a drawn seed. Their values are Gaussian, as in a network, and their shapes are few, since some
libraries compile for each shape.
"""

from dataclasses import fields
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conformance.profiles import fewer as fewer
from edm2_core.ladder import RUNGS, Switches
from edm2_core.network import NetworkConfig, Parameter, initialize, plan

seeds = st.integers(0, 2**32 - 1)
balances = st.floats(0.1, 0.9)
IMAGES = (2, 3, 4, 6)  # the shape of NCHW arrays
WEIGHTS = ((5, 7), (4, 3, 3, 3), (3, 1, 1, 1))


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_subnormal=False)


def numbers(*shape: int, low: float = -1e4, high: float = 1e4) -> st.SearchStrategy[np.ndarray]:
    """float32 arrays with elements in [low, high], none of them subnormal (libraries may flush those to zero)."""
    bounds = float(np.float32(low)), float(np.float32(high))
    return arrays(np.float32, shape, elements=floats(*bounds))


def weights() -> st.SearchStrategy[np.ndarray]:
    return st.sampled_from(WEIGHTS).flatmap(lambda shape: numbers(*shape))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


FORWARD, BACKWARD = 3, 5  # channels of the narrowest head for which rounding is bounded, see :func:`configs`


def switches() -> st.SearchStrategy[dict[str, Any]]:
    """Keywords of a config: a rung of the ladder, or one with any of its switches set."""
    kinds = {field.name: field.type for field in fields(Switches) if field.name != "ladder"}
    values = {name: st.booleans() if kind is bool else st.sampled_from((1, 2)) if kind is int else st.sampled_from(kind)
              for name, kind in kinds.items()}  # fmt: skip
    rungs = st.sampled_from(RUNGS[::-1])
    alone = st.fixed_dictionaries({"ladder": rungs})
    return st.one_of(alone, st.fixed_dictionaries({"ladder": rungs}, optional=values))


def _whole_heads(channels: int, per_head: int) -> bool:
    heads = channels // per_head
    return heads > 0 and channels % heads == 0


@st.composite
def configs(draw: Any, *, labels: bool | None = None, narrowest: int = FORWARD, ladder: Any = None) -> NetworkConfig:
    """Small networks: odd widths, up to three levels, rectangles, padding, conditions, attention on and off, labels or
    not, odd filters and balances, any rung of the ladder and any of its switches (``ladder``: what draws them).

    Pixel norm over d computed channels amplifies their rounding by 1 / r, where r is their rms, and r < delta has a
    chance of about delta^d. The mean square of the error, the integral of r^-2 r^(d - 1), is finite from d = 3; that of
    its derivative's, of r^-4 r^(d - 1), from d = 5. ``narrowest`` is the least d of a head; widths are 5 and more. A
    group norm that subtracts a mean leaves one degree less, so groups are wider by one.
    """
    levels = draw(st.integers(1, 3))
    smallest = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = tuple(side << levels - 1 for side in smallest)
    pad = draw(st.booleans())
    if pad:  # of as many rows and columns as the last size that needs no padding has
        size = tuple(side - draw(st.integers(0, (1 << levels - 1) - 1)) for side in size)
    channels = draw(st.integers(max(5, narrowest + 1), 10))
    mult = tuple(draw(st.permutations((1, 2, 1.5)))[:levels])
    widths = [int(channels * m) for m in mult]
    common = [d for d in range(narrowest, 11) if all(_whole_heads(width, d) for width in widths)]
    deepest = [d for d in range(narrowest, 21) if _whole_heads(widths[-1], d)]
    resolutions = {max(smallest) << level for level in (range(levels) if common else (0,))}
    return NetworkConfig(
        img_resolution=size,
        img_channels=draw(st.integers(1, 3)),
        cond_channels=draw(st.sampled_from((0, 0, 1, 2))),
        pad=pad,
        label_dim=draw(st.sampled_from((2, 3, 4) if labels else (0, 2, 3, 4))),
        model_channels=channels,
        channel_mult=mult,
        channel_mult_noise=draw(st.sampled_from((None, 1, 0.5))),
        channel_mult_emb=draw(st.sampled_from((None, 1))),
        num_blocks=draw(st.integers(1, 2)) if levels < 3 else 1,
        attn_resolutions=tuple(draw(st.sets(st.sampled_from(sorted(resolutions))))),
        channels_per_head=draw(st.sampled_from(common or deepest)),
        channels_per_group=draw(st.sampled_from((narrowest + 1, 32))),
        resample_filter=draw(st.sampled_from(((1, 1), (1, 3, 3, 1), (1, 2)))),
        label_balance=draw(balances),
        concat_balance=draw(balances),
        res_balance=draw(balances),
        attn_balance=draw(balances),
        clip_act=draw(st.sampled_from((256.0, None, 2.0))),
        sigma_data=draw(st.sampled_from((0.5, 1.0, 0.25))),
        logvar_channels=draw(st.integers(3, 8)),
        **draw(switches() if ladder is None else ladder),
    )


# For ports that compile each network and shape for seconds. Between them: odd widths, one level and two, attention,
# labels and none, a padded rectangle with a condition, a square, a wide filter, the ladder's last rung, and its first
# with normalized weights and learned uncertainty.
# Cases with central differences need networks that do not clip: the larger one does not, so that it is compiled once.
FEW_CONFIGS = (
    NetworkConfig(
        img_resolution=(3, 6), img_channels=2, cond_channels=1, pad=True, label_dim=3, model_channels=5,
        channel_mult=(1, 2), num_blocks=1, attn_resolutions=(3,), channels_per_head=5,
        resample_filter=(1, 3, 3, 1), label_balance=0.4, concat_balance=0.6,
        res_balance=0.35, attn_balance=0.2, clip_act=None, sigma_data=1.0, logvar_channels=5,
    ),
    NetworkConfig(
        img_resolution=3, img_channels=1, model_channels=14, channel_mult=(1,), channel_mult_noise=0.5, num_blocks=1,
        attn_resolutions=(), channels_per_head=7, channels_per_group=7, resample_filter=(1, 2), clip_act=2.0,
        logvar_channels=3, ladder="A", weight_norm=True, forced_norm=True, uncertainty=True,
    ),
)  # fmt: skip


def few(*, dearest: bool) -> dict[str, st.SearchStrategy[Any]]:
    """The strategies that then replace draws of these names; the ``dearest`` cases get only the smaller network."""
    return {
        "config": st.sampled_from(FEW_CONFIGS[1:] if dearest else FEW_CONFIGS),
        "other": st.just(FEW_CONFIGS[1]),
        "sizes": st.just((2, 2, 2, 2)),
        "betas": st.just((0.9, 0.99)),
        "sigma_rels": st.just((0.05, 0.10)),
    }


def random_parameters(config: NetworkConfig, seed: int, *, max_gain: float = 2.0) -> dict[str, np.ndarray]:
    """Parameters as after training: weights not of unit rms (without weight normalization, small enough to preserve
    magnitudes), and gains, biases and scales away from their initial values. float32, read-only."""
    rng, params, initial = np.random.default_rng(seed), {}, initialize(config, seed=seed)
    largest = 2.0 if config.switches.weight_norm else 1.0

    def value(name: str, parameter: Parameter) -> Any:
        match parameter.kind:
            case "weight":
                rms = rng.uniform(0.5, largest) / (config.weight_scale(parameter.fan_in) * sqrt(parameter.fan_in))
                return rms * rng.standard_normal(parameter.shape)
            case "bias":
                return 0.3 * rng.standard_normal(parameter.shape)
            case "scale":
                return rng.uniform(0.5, 1.5, parameter.shape)
            case "gain":
                return rng.choice((-1, 1)) * rng.uniform(0.25, 1) * max_gain
            case "constant":
                return initial[name]

    for name, parameter in plan(config).parameters.items():
        params[name] = np.asarray(value(name, parameter), dtype=np.float32)
    return frozen(params)


class Batch(NamedTuple):
    """The inputs of a training step; float32, read-only."""

    images: np.ndarray
    unit_noise: np.ndarray
    sigma: np.ndarray
    labels: np.ndarray | None
    condition: np.ndarray | None = None

    @property
    def rest(self) -> tuple[np.ndarray | None, ...]:
        """Labels, and the condition if there is one: ports without conditions need not take any."""
        return (self.labels,) if self.condition is None else (self.labels, self.condition)

    @property
    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """What a port is trained on."""
        return (self.images, self.unit_noise, self.sigma, *self.rest)

    @property
    def options(self) -> dict[str, np.ndarray]:
        """Keywords of sampling."""
        return {} if self.condition is None else {"condition": self.condition}

    def part(self, rows: slice) -> "Batch":
        """Some of the images."""
        parts: list[Any] = [None if array is None else frozen(array[rows]) for array in self]
        return Batch(*parts)

    @property
    def noisy(self) -> np.ndarray:
        return frozen(self.images + self.unit_noise * self.sigma)

    @property
    def with_a_dropped_label(self) -> "Batch":
        """The batch with zeros as the label of the second image, as label dropout makes it."""
        if self.labels is None:
            return self
        kept = np.array([[i != 1] for i in range(len(self.labels))], np.float32)
        return self._replace(labels=frozen(self.labels * kept))


def random_batch(config: NetworkConfig, seed: int, *, size: int = 2, P_mean: float = -0.4, P_std: float = 1.0) -> Batch:
    """Images and conditions of the config's standard deviation, noise levels from Eq. 16 within [0.02, 80]; labels are
    one-hot, or for odd seeds vectors of that magnitude."""
    rng, shape = np.random.default_rng(seed), (size, config.img_channels, *config.image_size)
    sigma = np.clip(np.exp(P_mean + P_std * rng.standard_normal((size, 1, 1, 1))), 0.02, 80.0)
    labels: Any = None
    condition = None
    if config.label_dim:
        labels = np.eye(config.label_dim, dtype=np.float32)[rng.integers(config.label_dim, size=size)]
        vectors = normal(seed + 3, *labels.shape) / np.float32(sqrt(config.label_dim))
        labels = vectors if seed % 2 else labels
    images = config.sigma_data * rng.standard_normal(shape)
    if config.cond_channels:
        condition = np.float32(config.sigma_data) * normal(seed + 2, size, config.cond_channels, *shape[2:])
    arrays = (images.astype(np.float32), normal(seed + 1, *shape), sigma.astype(np.float32), labels, condition)
    return Batch(*map(frozen, arrays))


def wide(params: Any) -> Any:
    """Arrays, or a dict or tuple of them, in float64, for the oracle."""
    if params is None:
        return None
    if isinstance(params, dict):
        return {name: wide(value) for name, value in params.items()}
    if isinstance(params, tuple):
        return tuple(wide(value) for value in params)
    return np.asarray(params, dtype=np.float64)


def frozen(arrays: Any) -> Any:
    """The same array, or dict of arrays, read-only."""
    for array in arrays.values() if isinstance(arrays, dict) else [arrays]:
        if array is not None:
            array.setflags(write=False)
    return arrays
