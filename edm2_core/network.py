"""The EDM2 network as data: a config becomes a plan that the reference and every port walk.

A :class:`NetworkConfig` holds the numbers that a person chooses. :func:`plan` turns it into a :class:`Plan`: the blocks
in the order they run, and the table of parameters, each with its canonical name, shape and initial distribution. No
port derives a shape, an order or a meaning from a name. What a network costs is counted from the same plan.

Source: arXiv 2312.02696 Appendix B, Figure 22 (CONFIG G), Table 6.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from math import isfinite, prod
from typing import Any, Literal
from zlib import crc32

import numpy as np

from .errors import InputError

Resample = Literal["keep", "up", "down"]
Role = Literal["conv", "enc", "dec"]
Init = Literal["normal", "zeros", "frequencies", "phases"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that determines a network and its parameters.

    Channels of a level are ``model_channels * channel_mult[level]``; a level halves the resolution of the one before.
    ``channel_mult_noise`` and ``channel_mult_emb`` give the width of the noise features and of the embedding in units
    of ``model_channels``; None takes the first and the widest level's. ``attn_resolutions`` that the network does not
    have are no fault. The ``*_balance`` are the blend t of Eqs. 88 and 103. ``clip_act`` bounds the activations after
    each block (None: never). ``dropout`` acts in training only.

    Raises:
        InputError: a field is out of range, or the resolution cannot be halved often enough.
    """

    img_resolution: int
    img_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    channel_mult_noise: float | None = None
    channel_mult_emb: float | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    resample_filter: tuple[float, ...] = (1, 1)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    dropout: float = 0.0
    sigma_data: float = 0.5
    logvar_channels: int = 128

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))

    @property
    def noise_channels(self) -> int:
        mult = self.channel_mult_noise
        return self.level_channels[0] if mult is None else int(self.model_channels * mult)

    @property
    def emb_channels(self) -> int:
        mult = self.channel_mult_emb
        return max(self.level_channels) if mult is None else int(self.model_channels * mult)


def _check(config: NetworkConfig) -> None:
    def rule(holds: bool, name: str, need: str, cure: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {need}, got {getattr(config, name)!r}: {cure}")

    positive = (
        "img_resolution",
        "img_channels",
        "model_channels",
        "num_blocks",
        "channels_per_head",
        "logvar_channels",
    )
    for name in positive:
        value = getattr(config, name)
        rule(isinstance(value, int) and value >= 1, name, "a whole number of at least 1", "choose a positive integer")
    rule(
        isinstance(config.label_dim, int) and config.label_dim >= 0,
        "label_dim",
        "a whole number >= 0",
        "0 is unconditional",
    )
    mults = config.channel_mult
    rule(len(mults) > 0 and all(m > 0 for m in mults), "channel_mult", "one or more positive numbers", "one per level")
    halvings = len(mults) - 1
    rule(
        config.img_resolution % (1 << halvings) == 0,
        "img_resolution",
        f"divisible by {1 << halvings} ({len(mults)} levels halve it {halvings} times)",
        "pad or resize the images, or shorten channel_mult",
    )
    taps = config.resample_filter
    rule(
        len(taps) >= 2 and len(taps) % 2 == 0 and all(map(isfinite, taps)) and sum(taps) != 0,
        "resample_filter",
        "an even number of finite taps with a nonzero sum",
        "(1, 1) is the paper's",
    )
    for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
        rule(0 <= getattr(config, name) <= 1, name, "within [0, 1]", "it is the blend t of mp_sum and mp_cat")
    rule(0 <= config.dropout < 1, "dropout", "within [0, 1)", "0.1 drops ten percent")
    rule(config.sigma_data > 0, "sigma_data", "positive", "0.5 is the paper's")
    rule(config.clip_act is None or config.clip_act > 0, "clip_act", "positive or None", "256 is usual")
    rule(config.noise_channels >= 1, "channel_mult_noise", "positive", "leave it out for the first level's width")
    rule(config.emb_channels >= 1, "channel_mult_emb", "positive", "leave it out for the widest level's width")
    for level, (channels, resolution) in enumerate(zip(config.level_channels, config.level_resolutions, strict=True)):
        attends = resolution in config.attn_resolutions or level == halvings
        if attends and channels % config.channels_per_head:
            raise InputError(
                f"channels of a level with attention must be divisible by channels_per_head, got {channels} at "
                f"{resolution}x{resolution} with {config.channels_per_head} per head: change one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class Block:
    """One step of the walk. ``in_channels`` counts the skip's, if it takes one; ``resolution`` is the one it ends at.

    Every encoder block's output (the ``conv`` too) is a skip; decoder blocks with ``takes_skip`` take the newest.
    """

    name: str
    role: Role
    resolution: int
    in_channels: int
    out_channels: int
    resample: Resample = "keep"
    heads: int = 0
    takes_skip: bool = False

    @property
    def has_conv_skip(self) -> bool:
        return self.in_channels != self.out_channels

    @property
    def residual_channels(self) -> int:
        """Input channels of the residual branch: encoder blocks change width before it, decoder blocks within it."""
        return self.out_channels if self.role == "enc" else self.in_channels


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Shape and nature of one named array. ``normal`` is a weight that forced normalization keeps on its sphere;
    ``zeros`` a learned scalar gain; ``frequencies`` and ``phases`` are Fourier constants, stored but never trained."""

    shape: tuple[int, ...]
    init: Init

    @property
    def normalized(self) -> bool:
        return self.init == "normal"

    @property
    def trained(self) -> bool:
        return self.init in ("normal", "zeros")


@dataclass(frozen=True)
class Plan:
    """What a port walks: blocks in running order and parameters by canonical name."""

    config: NetworkConfig
    encoder: tuple[Block, ...]
    decoder: tuple[Block, ...]
    parameters: Mapping[str, Parameter]


@lru_cache(maxsize=64)
def plan(config: NetworkConfig, /) -> Plan:
    """The blocks and the parameter table of a config.

    Source: arXiv 2312.02696 Figure 22. Departs from the paper: nothing. The first decoder block always attends.
    """
    encoder = tuple(_encoder(config))
    decoder = tuple(_decoder(config, encoder))
    return Plan(config, encoder, decoder, dict(_parameters(config, encoder, decoder)))


def _heads(config: NetworkConfig, resolution: int, channels: int) -> int:
    return channels // config.channels_per_head if resolution in config.attn_resolutions else 0


def _encoder(config: NetworkConfig) -> Iterator[Block]:
    width = config.img_channels + 1  # the constant channel of ones
    for level, (res, channels) in enumerate(zip(config.level_resolutions, config.level_channels, strict=True)):
        at = f"unet.enc.{res}x{res}"
        if level == 0:
            yield Block(name=f"{at}_conv", role="conv", resolution=res, in_channels=width, out_channels=channels)
            width = channels
        else:
            yield Block(
                name=f"{at}_down", role="enc", resolution=res, in_channels=width, out_channels=width, resample="down"
            )
        heads = _heads(config, res, channels)
        for i in range(config.num_blocks):
            name = f"{at}_block{i}"
            yield Block(name=name, role="enc", resolution=res, in_channels=width, out_channels=channels, heads=heads)
            width = channels


def _decoder(config: NetworkConfig, encoder: tuple[Block, ...]) -> Iterator[Block]:
    skips = [block.out_channels for block in encoder]
    width = skips[-1]
    levels = list(zip(config.level_resolutions, config.level_channels, strict=True))[::-1]
    for depth, (res, channels) in enumerate(levels):
        at = f"unet.dec.{res}x{res}"
        entry = partial(Block, role="dec", resolution=res, in_channels=width, out_channels=width)
        if depth == 0:
            yield entry(name=f"{at}_in0", heads=width // config.channels_per_head)
            yield entry(name=f"{at}_in1")
        else:
            yield entry(name=f"{at}_up", resample="up")
        heads = _heads(config, res, channels)
        for i in range(config.num_blocks + 1):
            yield Block(
                name=f"{at}_block{i}",
                role="dec",
                resolution=res,
                in_channels=width + skips.pop(),
                out_channels=channels,
                heads=heads,
                takes_skip=True,
            )
            width = channels


def _parameters(
    config: NetworkConfig, encoder: tuple[Block, ...], decoder: tuple[Block, ...]
) -> Iterator[tuple[str, Parameter]]:
    def weight(*shape: int) -> Parameter:
        return Parameter(shape=shape, init="normal")

    def fourier(name: str, channels: int) -> Iterator[tuple[str, Parameter]]:
        yield f"{name}.freqs", Parameter(shape=(channels,), init="frequencies")
        yield f"{name}.phases", Parameter(shape=(channels,), init="phases")

    emb = config.emb_channels
    gain = Parameter(shape=(), init="zeros")
    yield from fourier("unet.emb_fourier", config.noise_channels)
    yield "unet.emb_noise.weight", weight(emb, config.noise_channels)
    if config.label_dim:
        yield "unet.emb_label.weight", weight(emb, config.label_dim)
    for block in (*encoder, *decoder):
        if block.role == "conv":
            yield f"{block.name}.weight", weight(block.out_channels, block.in_channels, 3, 3)
            continue
        cin, cout = block.in_channels, block.out_channels
        yield f"{block.name}.emb_gain", gain
        yield f"{block.name}.conv_res0.weight", weight(cout, block.residual_channels, 3, 3)
        yield f"{block.name}.emb_linear.weight", weight(cout, emb)
        yield f"{block.name}.conv_res1.weight", weight(cout, cout, 3, 3)
        if block.has_conv_skip:
            yield f"{block.name}.conv_skip.weight", weight(cout, cin, 1, 1)
        if block.heads:
            yield f"{block.name}.attn_qkv.weight", weight(3 * cout, cout, 1, 1)
            yield f"{block.name}.attn_proj.weight", weight(cout, cout, 1, 1)
    yield "unet.out_conv.weight", weight(config.img_channels, decoder[-1].out_channels, 3, 3)
    yield "unet.out_gain", gain
    yield from fourier("logvar_fourier", config.logvar_channels)
    yield "logvar_linear.weight", weight(1, config.logvar_channels)


def initialize(config: NetworkConfig, /, *, seed: int) -> dict[str, np.ndarray]:
    """Initial parameters, float32, the same in every port: each array depends on (seed, its name) alone.

    Weights are N(0, 1) (Appendix B.4), gains 0, frequencies 2 pi N(0, 1) and phases 2 pi U(0, 1) (Eqs. 35-36).
    """

    def draw(name: str, parameter: Parameter) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[seed, crc32(name.encode())]))
        match parameter.init:
            case "normal":
                return generator.standard_normal(parameter.shape, dtype=np.float32)
            case "zeros":
                return np.zeros(parameter.shape, np.float32)
            case "frequencies":
                return np.float32(2 * np.pi) * generator.standard_normal(parameter.shape, dtype=np.float32)
            case "phases":
                return np.float32(2 * np.pi) * generator.random(parameter.shape, dtype=np.float32)

    return {name: draw(name, parameter) for name, parameter in plan(config).parameters.items()}


def check_parameters(config: NetworkConfig, params: Mapping[str, Any], /) -> None:
    """Raise InputError, naming the first offender, unless ``params`` has exactly the plan's names and shapes."""
    table, cure = plan(config).parameters, "use the config they were made with"
    for name, parameter in table.items():
        if name not in params:
            raise InputError(f"parameters must be those of the config, {name} is missing: {cure}")
        if (shape := tuple(params[name].shape)) != parameter.shape:
            raise InputError(f"{name} must have shape {parameter.shape}, got {shape}: {cure}")
    if unknown := sorted(set(params) - set(table)):
        raise InputError(f"parameters must be those of the config, {unknown[0]} is none of them: {cure}")


def parameter_count(config: NetworkConfig, /) -> int:
    """Trained scalars of the denoiser, the count of Tables 1 and 6: without the uncertainty u(sigma), which is dropped
    after training, and without Fourier constants."""
    table = plan(config).parameters
    return sum(prod(p.shape) for name, p in table.items() if p.trained and not name.startswith("logvar"))


def multiply_adds(config: NetworkConfig, /) -> int:
    """Multiply-adds of one evaluation of one image, in convolutions, linear layers and attention products.

    Departs from the paper: its Gflops count elementwise work as well, so they are about 1.5 % larger (S: 102.2e9
    there, 100.8e9 here). Twice this number is the usual FLOP count.
    """
    walk = plan(config)
    blocks = (*walk.encoder, *walk.decoder)
    pixels = {f"{block.name}.{part}": block.resolution**2 for block in blocks for part in _CONVOLUTIONS}
    pixels["unet.out_conv.weight"] = config.img_resolution**2
    products = sum(prod(p.shape) * pixels.get(name, 1) for name, p in walk.parameters.items() if p.normalized)
    attention = sum(2 * block.resolution**4 * block.out_channels for block in blocks if block.heads)
    return products + attention


_CONVOLUTIONS = (
    "weight",  # of a block that is one convolution
    *(f"{part}.weight" for part in ("conv_res0", "conv_res1", "conv_skip", "attn_qkv", "attn_proj")),
)
