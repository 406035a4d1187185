"""What a person chooses about a network: its sizes, and the rung of the paper's ladder that it is on.

Source: arXiv 2312.02696 Appendix B, Table 6.
"""

from dataclasses import dataclass, fields
from math import isfinite, sqrt
from typing import Any

from ..errors import InputError
from ..ladder import LADDER, LADDER_TRAINING, Rung, Switches, rung, with_switches
from ..mp import SILU_RMS, blend

GROUP_NORM_EPS = 1e-5
"""Added to the variance in the affine group norm. The paper does not say; this is the usual value."""


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """The fields of a :class:`NetworkConfig`, which documents them."""

    img_resolution: int | tuple[int, int]
    img_channels: int
    cond_channels: int = 0
    pad: bool = False
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    channel_mult_noise: float | None = None
    channel_mult_emb: float | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...]
    channels_per_head: int = 64
    channels_per_group: int = 32
    resample_filter: tuple[float, ...] = (1, 1)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    dropout: float = 0.0
    label_dropout: float = 0.0
    sigma_data: float = 0.5
    logvar_channels: int = 128
    switches: Switches


class NetworkConfig(_Fields):
    """Everything that determines a network and its parameters.

    ``img_resolution`` is the side of square images, or (height, width). Each level has half the height and width of the
    one before; sizes that cannot be halved so often need ``pad``: the network then surrounds its input with zeros up to
    the next size that can, and cuts its output back. ``cond_channels`` are those of an image-shaped condition, which is
    concatenated to the input (:func:`edm2_core.precond.join_condition`). ``label_dim`` is the number of classes, or the
    length of label vectors.

    Channels of a level are ``model_channels * channel_mult[level]``. ``channel_mult_noise`` and ``channel_mult_emb``
    give the width of the noise features and of the embedding in units of ``model_channels``; None takes the first and
    the widest level's. ``attn_resolutions`` are the longer sides of the levels whose blocks attend; entries that the
    network does not have are ignored. The ``*_balance`` are the blend t of Eqs. 88 and 103, where functions preserve
    magnitude. ``clip_act`` bounds the activations after each block (None: never). ``dropout`` acts in training only.
    ``label_dropout`` is the share of training images whose label is dropped (:func:`edm2_core.loss.drop_labels`): with
    0, a network with labels is never trained without one, and cannot guide itself. Groups of a group norm are
    ``channels_per_group`` wide, or the next width that divides the channels evenly.

    ``switches`` is the rung with all its :class:`~edm2_core.ladder.Switches`. For convenience, and for JSON, they can
    be given flat: ``NetworkConfig(..., ladder="C", bias=True)`` is CONFIG C with biases. None takes the value of
    ``switches``, or else of the rung, CONFIG G by default. ``attn_resolutions=None`` takes the rung's. Lists are
    converted to tuples, and names of enum values to the enum, as JSON needs. :meth:`to_json` writes the flat form.

    Raises:
        InputError: an unknown field, a field out of range, or a resolution that cannot be halved often enough.
        TypeError: ``img_resolution`` or ``img_channels`` is missing.

    >>> NetworkConfig(img_resolution=64, img_channels=3, ladder="C", bias=True).switches.bias
    True
    """

    def __init__(self, *, ladder: Rung | None = None, switches: Switches | None = None, **given: Any) -> None:
        if unknown := sorted(given.keys() - _KNOWN):
            raise InputError(
                f"fields of a network must be those of NetworkConfig and Switches, got {unknown[0]!r}: "
                "check the spelling, or the version of edm2"
            )
        own = {name: value for name in _SWITCHES if (value := given.pop(name, None)) is not None}
        start = LADDER["G"] if switches is None else switches
        chosen = with_switches(start if ladder is None else rung(ladder), **own)
        if given.get("attn_resolutions") is None:
            given["attn_resolutions"] = LADDER_TRAINING[chosen.ladder].attn_resolutions
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        match plain.get("img_resolution"):
            case (height, width) if height == width:
                plain["img_resolution"] = height  # a square has one spelling
        super().__init__(switches=chosen, **plain)
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """The config as plain values: its fields, with the switches flat, and None for those that are the rung's.

        ``NetworkConfig(**config.to_json())`` equals the config, also after the values went through JSON text.
        """
        own, usual = vars(self.switches), vars(LADDER[self.ladder])
        flat = {name: own[name] if own[name] != usual[name] else None for name in _SWITCHES}
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "switches"}
        return {**plain, "ladder": self.ladder, **flat}

    @property
    def ladder(self) -> Rung:
        """The rung that the switches started from."""
        return self.switches.ladder

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
        """The divisor of silu. Source: Eq. 81, or 1."""
        return SILU_RMS if self.switches.mp_functions else 1.0

    @property
    def fourier_scale(self) -> float:
        """The factor of the cosines of Fourier features. Source: Eq. 75, or 1."""
        return sqrt(2) if self.switches.mp_functions else 1.0

    def groups(self, channels: int, /) -> int:
        """How many groups a group norm divides ``channels`` into. Groups are of equal width, the least from
        ``channels_per_group`` on that divides ``channels``; there is one group where there are fewer channels."""
        sizes = range(min(self.channels_per_group, channels), channels + 1)
        return channels // next(size for size in sizes if channels % size == 0)

    def weight_scale(self, fan_in: int, /) -> float:
        """The factor by which a layer multiplies its stored weight where it does not normalize it."""
        return 1 / sqrt(fan_in) if self.switches.fan_in_scaled else 1.0

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, the highest resolution first."""
        return tuple(int(self.model_channels * mult) for mult in self.channel_mult)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.img_resolution
        return size if isinstance(size, tuple) else (size, size)

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows of zeros (above, below) and columns of zeros (left, right) around the network's input."""
        above, left = (-side % (1 << len(self.channel_mult) - 1) for side in self.image_size)
        return (above // 2, above - above // 2), (left // 2, left - left // 2)

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each level, the highest resolution first."""
        height, width = (side + sum(added) for side, added in zip(self.image_size, self.padding, strict=True))
        return tuple((height >> level, width >> level) for level in range(len(self.channel_mult)))

    @property
    def in_channels(self) -> int:
        """Channels of the network's input: the image, its condition, and a channel of ones where the rung has it."""
        return self.img_channels + self.cond_channels + self.switches.ones_channel

    def attends(self, size: tuple[int, int], /) -> bool:
        """Whether the blocks of a level of this height and width have attention."""
        return max(size) in self.attn_resolutions

    @property
    def noise_channels(self) -> int:
        """Width of the Fourier features of the noise level."""
        mult = self.channel_mult_noise
        return self.level_channels[0] if mult is None else int(self.model_channels * mult)

    @property
    def emb_channels(self) -> int:
        """Width of the embedding that conditions the blocks."""
        mult = self.channel_mult_emb
        return max(self.level_channels) if mult is None else int(self.model_channels * mult)


_SWITCHES = tuple(field.name for field in fields(Switches) if field.name != "ladder")
_KNOWN = {*_SWITCHES, *(field.name for field in fields(_Fields))}


def _check(config: NetworkConfig) -> None:
    """Raise InputError unless every field is in range and the levels have whole pixels and whole heads."""

    def rule(holds: bool, name: str, need: str, cure: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {need}, got {getattr(config, name)!r}: {cure}")

    positive = (
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
        most = 1000 if name == "num_blocks" else 1 << 20
        rule(value <= most, name, f"at most {most}", "nothing holds such a network")
    whole_sides = len(config.image_size) == 2 and all(type(side) is int and side >= 1 for side in config.image_size)
    rule(whole_sides, "img_resolution", "a whole number of at least 1, or two of them", "give (height, width)")
    for name, none in (("label_dim", "unconditional"), ("cond_channels", "no condition")):
        value = getattr(config, name)
        rule(isinstance(value, int) and value >= 0, name, "a whole number >= 0", f"0 is {none}")
    rule(isinstance(config.pad, bool), "pad", "True or False", "leave it out")
    mults = config.channel_mult
    rule(len(mults) > 0 and all(m > 0 for m in mults), "channel_mult", "one or more positive numbers", "one per level")
    for name, factors in (
        ("channel_mult", mults),
        ("channel_mult_noise", (config.channel_mult_noise or 1,)),
        ("channel_mult_emb", (config.channel_mult_emb or 1,)),
    ):
        rule(all(m <= 1000 for m in factors), name, "at most 1000", "it multiplies model_channels")
    halvings = len(mults) - 1
    rule(
        config.pad or not any(side % (1 << halvings) for side in config.image_size),
        "img_resolution",
        f"divisible by {1 << halvings} ({len(mults)} levels halve it {halvings} times)",
        "set pad, resize the images, or shorten channel_mult",
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
    rule(0 <= config.label_dropout < 1, "label_dropout", "within [0, 1)", "0.1 drops the label of every tenth image")
    rule(
        config.label_dim > 0 or not config.label_dropout,
        "label_dropout",
        "0 for a network without labels",
        "leave it out, or train with labels",
    )
    rule(config.sigma_data > 0, "sigma_data", "positive", "0.5 is the paper's")
    rule(config.clip_act is None or config.clip_act > 0, "clip_act", "positive or None", "256 is usual")
    rule(config.noise_channels >= 1, "channel_mult_noise", "positive", "leave it out for the first level's width")
    rule(config.emb_channels >= 1, "channel_mult_emb", "positive", "leave it out for the widest level's width")
    for level, (channels, size) in enumerate(zip(config.level_channels, config.level_sizes, strict=True)):
        attends = config.attends(size) or level == halvings
        heads = channels // config.channels_per_head
        if attends and (not heads or channels % heads):
            raise InputError(
                "channels of a level with attention must make one or more equal heads of at least channels_per_head, "
                f"got {channels} at {size[0]}x{size[1]} with {config.channels_per_head} per head: change one of the two"
            )
