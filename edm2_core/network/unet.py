"""The U-Net as data: :func:`plan` turns a config into a :class:`Plan`, which the reference and every port execute.

A plan holds the blocks in the order they run, and the table of parameters, each with its canonical name, shape and
initial distribution. No port derives a shape, an order or a role from a name.

Source: arXiv 2312.02696 Appendix B, Figures 16 to 22 (CONFIG A to G).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any, Literal

from ..errors import InputError
from ..ladder import Attention, GroupNorm, Initialization, NoiseEmbedding, Switches
from ..mp import Resample
from .config import NetworkConfig

Role = Literal["conv", "enc", "dec"]
Kind = Literal["weight", "bias", "scale", "gain", "constant"]
Init = Literal["normal", "he", "zeros", "ones", "frequencies", "phases", "positions", "quadratures"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the network.

    ``in_channels`` includes the channels of the skip, if the block takes one; ``size`` is height and width of the
    output. The output of every encoder block, ``conv`` included, is a skip; decoder blocks with ``takes_skip`` take the
    newest one. ``conv_skip`` exists where widths differ: before the two paths part if ``widens_first``, else on the
    main path.
    """

    name: str
    role: Role
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    resample: Resample = "keep"
    heads: int = 0
    takes_skip: bool = False
    widens_first: bool = False

    @property
    def has_conv_skip(self) -> bool:
        """Whether the block changes the number of channels by a 1x1 convolution."""
        return self.in_channels != self.out_channels

    @property
    def residual_channels(self) -> int:
        """Input channels of the residual branch."""
        return self.out_channels if self.widens_first else self.in_channels


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Shape, kind and initial distribution of one named array.

    ``fan_in`` is the number of inputs of each output of a weight; a bias has that of its weight. ``normalized`` weights
    are subject to forced normalization. Constants (Fourier frequencies and phases) are stored but never trained.
    """

    shape: tuple[int, ...]
    kind: Kind
    init: Init
    fan_in: int = 1
    normalized: bool = False

    @property
    def trained(self) -> bool:
        """Whether the optimizer changes it."""
        return self.kind != "constant"


@dataclass(frozen=True)
class Plan:
    """What a port executes: blocks in the order they run, parameters by canonical name, the switches of the rung."""

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


def _heads(config: NetworkConfig, size: tuple[int, int], channels: int) -> int:
    return channels // config.channels_per_head if config.attends(size) else 0


def _encoder(config: NetworkConfig) -> Iterator[Block]:
    width = config.in_channels
    block = partial(Block, role="enc", widens_first=config.switches.widen_first)
    for level, (size, channels) in enumerate(zip(config.level_sizes, config.level_channels, strict=True)):
        at = f"unet.enc.{size[0]}x{size[1]}"
        if level == 0:
            yield Block(name=f"{at}_conv", role="conv", size=size, in_channels=width, out_channels=channels)
            width = channels
        else:
            yield block(name=f"{at}_down", size=size, in_channels=width, out_channels=width, resample="down")
        heads = _heads(config, size, channels)
        for i in range(config.num_blocks):
            name = f"{at}_block{i}"
            yield block(name=name, size=size, in_channels=width, out_channels=channels, heads=heads)
            width = channels


def _decoder(config: NetworkConfig, encoder: tuple[Block, ...]) -> Iterator[Block]:
    skips = [block.out_channels for block in encoder]
    width = skips[-1]
    levels = list(zip(config.level_sizes, config.level_channels, strict=True))[::-1]
    for depth, (size, channels) in enumerate(levels):
        at = f"unet.dec.{size[0]}x{size[1]}"
        entry = partial(Block, role="dec", size=size, in_channels=width, out_channels=width)
        if depth == 0:
            yield entry(name=f"{at}_in0", heads=width // config.channels_per_head)
            yield entry(name=f"{at}_in1")
        else:
            yield entry(name=f"{at}_up", resample="up")
        heads = _heads(config, size, channels)
        for i in range(config.num_blocks + 1):
            yield Block(
                name=f"{at}_block{i}",
                role="dec",
                size=size,
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
    """The learned scale and bias of a group norm, if it has them."""
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
