"""The EDM2 network as data: a config becomes a plan that the reference and every port walk.

A :class:`NetworkConfig` holds the numbers that a person chooses. :func:`plan` turns it into a :class:`Plan`: the blocks
in the order they run, and the table of parameters, each with its canonical name, shape and initial distribution. No
port derives a shape, an order or a meaning from a name. What a network costs is counted from the same plan.

Source: arXiv 2312.02696 Appendix B, Figures 16 to 22 (CONFIG A to G), Table 6.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from math import isfinite, prod, sqrt
from typing import Any, Literal
from zlib import crc32

import numpy as np

from .errors import InputError
from .ladder import (
    LADDER,
    LADDER_TRAINING,
    Attention,
    GroupNorm,
    Initialization,
    NoiseEmbedding,
    Rung,
    Switches,
    blend,
)
from .mp import SILU_RMS, Resample

Role = Literal["conv", "enc", "dec"]
Kind = Literal["weight", "bias", "scale", "gain", "constant"]
Init = Literal["normal", "he", "zeros", "ones", "frequencies", "phases", "positions", "quadratures"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that determines a network and its parameters.

    Channels of a level are ``model_channels * channel_mult[level]``; a level halves the resolution of the one before.
    ``channel_mult_noise`` and ``channel_mult_emb`` give the width of the noise features and of the embedding in units
    of ``model_channels``; None takes the first and the widest level's. ``attn_resolutions`` that the network does not
    have are no fault; None takes the rung's. The ``*_balance`` are the blend t of Eqs. 88 and 103, where functions
    preserve magnitude. ``clip_act`` bounds the activations after each block (None: never). ``dropout`` acts in training
    only. Groups of a group norm are ``channels_per_group`` wide, or as much wider as makes them equal.

    ``ladder`` is the rung, CONFIG A to G. The fields after it are its switches, see
    :class:`~edm2_core.ladder.Switches`: None takes the rung's; :attr:`switches` has them all.

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
    attn_resolutions: tuple[int, ...] = None  # type: ignore[assignment]  # until __post_init__ takes the rung's
    channels_per_head: int = 64
    channels_per_group: int = 32
    resample_filter: tuple[float, ...] = (1, 1)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    dropout: float = 0.0
    sigma_data: float = 0.5
    logvar_channels: int = 128
    ladder: Rung = "G"
    group_norm: GroupNorm | None = None
    bias: bool | None = None
    ones_channel: bool | None = None
    noise_embedding: NoiseEmbedding | None = None
    embedding_layers: int | None = None
    shift: bool | None = None
    attention: Attention | None = None
    init: Initialization | None = None
    label_scaling: bool | None = None
    weight_norm: bool | None = None
    forced_norm: bool | None = None
    pixel_norm: bool | None = None
    resample_first: bool | None = None
    widen_first: bool | None = None
    output_norm: bool | None = None
    mp_functions: bool | None = None
    gains: bool | None = None
    uncertainty: bool | None = None

    def __post_init__(self) -> None:
        if self.ladder not in LADDER:
            raise InputError(f"ladder must be one of {', '.join(LADDER)}, got {self.ladder!r}: G is the paper's last")
        if self.attn_resolutions is None:
            object.__setattr__(self, "attn_resolutions", LADDER_TRAINING[self.ladder].attn_resolutions)
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):  # JSON brings lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _SWITCHES:  # JSON brings the values of enums
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(self.switches, name))
        _check(self)

    @cached_property
    def switches(self) -> Switches:
        """Those of the rung, but for the ones set here."""
        own = {name: value for name in _SWITCHES if (value := getattr(self, name)) is not None}
        return replace(LADDER[self.ladder], **own)

    def blend(self, t: float, /) -> tuple[float, float]:
        """Factors of a and b in a sum of the two. Source: Eq. 88, or 1 and 1."""
        return blend(t) if self.switches.mp_functions else (1.0, 1.0)

    def concat_blend(self, size: int, other: int, /) -> tuple[float, float]:
        """Factors of a and b, ``size`` and ``other`` channels wide, before they are concatenated. Source: Eq. 103, or 1
        and 1."""
        if not self.switches.mp_functions:
            return 1.0, 1.0
        keep, add = self.blend(self.concat_balance)
        return keep * sqrt((size + other) / size), add * sqrt((size + other) / other)

    @property
    def silu_rms(self) -> float:
        """What silu is divided by. Source: Eq. 81, or 1."""
        return SILU_RMS if self.switches.mp_functions else 1.0

    @property
    def fourier_scale(self) -> float:
        """What cosines are multiplied by. Source: Eq. 75, or 1."""
        return sqrt(2) if self.switches.mp_functions else 1.0

    def groups(self, channels: int, /) -> int:
        """Groups that a group norm divides ``channels`` into: equal, and ``channels_per_group`` wide or as little more
        as can be; one where the width is less."""
        sizes = range(min(self.channels_per_group, channels), channels + 1)
        return channels // next(size for size in sizes if channels % size == 0)

    def weight_scale(self, fan_in: int, /) -> float:
        """What a stored weight, normalized or not, is multiplied by in its layer."""
        return 1 / sqrt(fan_in) if self.switches.fan_in_scaled else 1.0

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


_SWITCHES = tuple(field.name for field in fields(Switches))


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
        "channels_per_group",
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
    ``conv_skip``, where widths differ, stands before the two paths part if ``widens_first``, else on the main path.
    """

    name: str
    role: Role
    resolution: int
    in_channels: int
    out_channels: int
    resample: Resample = "keep"
    heads: int = 0
    takes_skip: bool = False
    widens_first: bool = False

    @property
    def has_conv_skip(self) -> bool:
        return self.in_channels != self.out_channels

    @property
    def residual_channels(self) -> int:
        """Input channels of the residual branch."""
        return self.out_channels if self.widens_first else self.in_channels


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Shape and nature of one named array. ``fan_in`` is the number of inputs of a weight's outputs, or of the weight
    whose bias it is. ``normalized`` weights are kept on their spheres by forced normalization; constants (Fourier
    frequencies and phases) are stored but never trained."""

    shape: tuple[int, ...]
    kind: Kind
    init: Init
    fan_in: int = 1
    normalized: bool = False

    @property
    def trained(self) -> bool:
        return self.kind != "constant"


@dataclass(frozen=True)
class Plan:
    """What a port walks: blocks in running order, parameters by canonical name, and the switches of the rung."""

    config: NetworkConfig
    switches: Switches
    encoder: tuple[Block, ...]
    decoder: tuple[Block, ...]
    parameters: Mapping[str, Parameter]


@lru_cache(maxsize=64)
def plan(config: NetworkConfig, /) -> Plan:
    """The blocks and the parameter table of a config.

    Source: arXiv 2312.02696 Figures 16 to 22. Departs from the paper: nothing. The first decoder block always attends.
    """
    encoder = tuple(_encoder(config))
    decoder = tuple(_decoder(config, encoder))
    return Plan(config, config.switches, encoder, decoder, dict(_parameters(config, encoder, decoder)))


def _heads(config: NetworkConfig, resolution: int, channels: int) -> int:
    return channels // config.channels_per_head if resolution in config.attn_resolutions else 0


def _encoder(config: NetworkConfig) -> Iterator[Block]:
    width = config.img_channels + config.switches.ones_channel
    block = partial(Block, role="enc", widens_first=config.switches.widen_first)
    for level, (res, channels) in enumerate(zip(config.level_resolutions, config.level_channels, strict=True)):
        at = f"unet.enc.{res}x{res}"
        if level == 0:
            yield Block(name=f"{at}_conv", role="conv", resolution=res, in_channels=width, out_channels=channels)
            width = channels
        else:
            yield block(name=f"{at}_down", resolution=res, in_channels=width, out_channels=width, resample="down")
        heads = _heads(config, res, channels)
        for i in range(config.num_blocks):
            name = f"{at}_block{i}"
            yield block(name=name, resolution=res, in_channels=width, out_channels=channels, heads=heads)
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


Named = Iterator[tuple[str, Parameter]]


def _parameters(config: NetworkConfig, encoder: tuple[Block, ...], decoder: tuple[Block, ...]) -> Named:
    has, emb = config.switches, config.emb_channels
    layer, norm = partial(_layer, has), partial(_norm, has)
    gain = Parameter(shape=(), kind="gain", init="zeros")
    yield from _fourier("unet.emb_fourier", config.noise_channels, has.noise_embedding)
    yield from layer("unet.emb_noise", emb, config.noise_channels)
    if has.embedding_layers == 2:
        yield from layer("unet.emb_noise1", emb, emb)
    if config.label_dim:
        yield from layer("unet.emb_label", emb, config.label_dim, classes=True)
    for block in (*encoder, *decoder):
        name, cin, cout = block.name, block.in_channels, block.out_channels
        if block.role == "conv":
            yield from layer(name, cout, cin, 3, 3)
            continue
        if has.gains:
            yield f"{name}.emb_gain", gain
        yield from norm(f"{name}.norm_res0", block.residual_channels)
        yield from layer(f"{name}.conv_res0", cout, block.residual_channels, 3, 3)
        yield from layer(f"{name}.emb_linear", 2 * cout if has.shift else cout, emb)
        yield from norm(f"{name}.norm_res1", cout)
        yield from layer(f"{name}.conv_res1", cout, cout, 3, 3, last=True)
        if block.has_conv_skip:
            yield from layer(f"{name}.conv_skip", cout, cin, 1, 1)
        if block.heads:
            if has.attention is Attention.DOT:
                yield from norm(f"{name}.norm_attn", cout)
            yield from layer(f"{name}.attn_qkv", 3 * cout, cout, 1, 1)
            yield from layer(f"{name}.attn_proj", cout, cout, 1, 1, last=True)
    width = decoder[-1].out_channels
    if has.output_norm:
        yield from norm("unet.out_norm", width)
    yield from layer("unet.out_conv", config.img_channels, width, 3, 3, last=True)
    if has.gains:
        yield "unet.out_gain", gain
    if has.uncertainty:
        yield from _fourier("logvar_fourier", config.logvar_channels, NoiseEmbedding.FOURIER)
        yield from layer("logvar_linear", 1, config.logvar_channels)


def _layer(has: Switches, name: str, *shape: int, last: bool = False, classes: bool = False) -> Named:
    """Weight, and bias where layers have one, of a linear layer or convolution. ``last``: of its branch, begins at 0
    under :attr:`Initialization.HE_ZERO`; ``classes``: an embedding of one-hot labels, without bias."""
    fan_in, init = prod(shape[1:]), _WEIGHT_INIT[has.init]
    if has.init is Initialization.HE_ZERO and (last or classes):
        init = "zeros" if last else "normal"
    yield (
        f"{name}.weight",
        Parameter(shape=shape, kind="weight", init=init, fan_in=fan_in, normalized=has.forced_norm),
    )
    if has.bias and not classes:
        bias: Init = "he" if init == "he" else "zeros"
        yield f"{name}.bias", Parameter(shape=shape[:1], kind="bias", init=bias, fan_in=fan_in)


_WEIGHT_INIT: dict[Initialization, Init] = {
    Initialization.HE_ZERO: "he",
    Initialization.HE: "he",
    Initialization.NORMAL: "normal",
}


def _norm(has: Switches, name: str, channels: int) -> Named:
    """What a group norm learns."""
    if has.group_norm is GroupNorm.AFFINE:
        yield f"{name}.scale", Parameter(shape=(channels,), kind="scale", init="ones")
        yield f"{name}.bias", Parameter(shape=(channels,), kind="bias", init="zeros")


def _fourier(name: str, channels: int, features: NoiseEmbedding) -> Named:
    freqs, phases = _FEATURES[features]
    yield f"{name}.freqs", Parameter(shape=(channels,), kind="constant", init=freqs)
    yield f"{name}.phases", Parameter(shape=(channels,), kind="constant", init=phases)


_FEATURES: dict[NoiseEmbedding, tuple[Init, Init]] = {
    NoiseEmbedding.FOURIER: ("frequencies", "phases"),
    NoiseEmbedding.POSITIONAL: ("positions", "quadratures"),
}


def initialize(config: NetworkConfig, /, *, seed: int) -> dict[str, np.ndarray]:
    """Initial parameters, float32, the same in every port: each array depends on (seed, its name) alone.

    Weights are N(0, 1) (Appendix B.4) or He's uniform, +-sqrt(6 / fan-in) (Appendix B.1), and so are biases; gains 0;
    scales of group norms 1. Frequencies are 2 pi N(0, 1) and phases 2 pi U(0, 1) (Eqs. 35-36); of the positional
    embedding they are 10000^(-i / n), i < n = channels / 2, once for cosines and once more for sines.
    """

    def draw(name: str, parameter: Parameter) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[seed, crc32(name.encode())]))
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
    """Multiply-adds of one evaluation of one image: of convolutions, linear layers and attention products, and three
    for each weight that is normalized on the way (its square, its root's share, its scaling).

    Departs from the paper: its Gflops count elementwise work on activations as well, so they are up to 1.5 % larger.
    Twice this number is the usual FLOP count.
    """
    walk = plan(config)
    blocks = (*walk.encoder, *walk.decoder)
    pixels = {f"{block.name}.{part}": block.resolution**2 for block in blocks for part in _CONVOLUTIONS}
    pixels["unet.out_conv.weight"] = config.img_resolution**2
    weights = {name: prod(p.shape) for name, p in walk.parameters.items() if p.kind == "weight"}
    products = sum(size * pixels.get(name, 1) for name, size in weights.items())
    attention = sum(2 * block.resolution**4 * block.out_channels for block in blocks if block.heads)
    return products + attention + (3 * sum(weights.values()) if walk.switches.weight_norm else 0)


_CONVOLUTIONS = (
    "weight",  # of a block that is one convolution
    *(f"{part}.weight" for part in ("conv_res0", "conv_res1", "conv_skip", "attn_qkv", "attn_proj")),
)
