"""The paper's ladder as data: CONFIG A to G, where each rung changes some switches of the one before.

:class:`Switches` describe the network of a rung, :class:`RungTraining` its training in the paper. A
:class:`~edm2_core.network.NetworkConfig` starts from a rung and may change any switch.

Source: arXiv 2312.02696 Section 2, Appendix B, Figures 16 to 22.
"""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, get_args

from .errors import InputError

Rung = Literal["A", "B", "C", "D", "E", "F", "G"]
RUNGS: tuple[Rung, ...] = get_args(Rung)


class GroupNorm(StrEnum):
    """How groups of channels are normalized over the image before nonlinearities."""

    AFFINE = "affine"
    """To zero mean and unit variance, then a learned scale and bias for each channel."""
    PLAIN = "plain"
    """To unit root mean square (Eq. 29)."""
    NONE = "none"


class NoiseEmbedding(StrEnum):
    """The features of c_noise from which the embedding is computed."""

    POSITIONAL = "positional"
    """Cosines and sines of fixed frequencies from 1 down to 1 / 10000."""
    FOURIER = "fourier"
    """Cosines of random frequencies and phases, which are constants (Eqs. 35-36)."""


class Attention(StrEnum):
    """How queries and keys are compared."""

    DOT = "dot"
    """Dot products of queries and keys (Eq. 11), after a group norm of the input."""
    COSINE = "cosine"
    """Dot products after pixel norm of queries and keys; values are normalized too (Eq. 34)."""


class Initialization(StrEnum):
    """The distribution of initial weights."""

    HE_ZERO = "he-zero"
    """He's uniform; N(0, 1) for labels; zeros for the last convolution of residual branches and of the network."""
    HE = "he"
    """He's uniform for every weight."""
    NORMAL = "normal"
    """N(0, 1) for every weight; layers divide by sqrt(fan-in)."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The differences between the networks of the ladder.

    ``bias``: convolutions and linear layers have one. ``ones_channel``: a channel of ones is added to the image.
    ``embedding_layers``: linear layers on the features of the noise level, 1 or 2. ``shift``: the embedding shifts
    activations as well as scaling them. ``label_scaling``: one-hot labels are multiplied by sqrt(label_dim).
    ``weight_norm``: layers normalize their weights (Eq. 47). ``forced_norm``: stored weights are normalized before each
    step (Eq. 66). ``pixel_norm``: the main path of encoder blocks starts with one. ``resample_first``: blocks resample
    at their start, not within the two paths. ``widen_first``: encoder blocks change their width before the paths part.
    ``output_norm``: group norm and SiLU before the last convolution. ``mp_functions``: Fourier features, SiLU, sums and
    concatenations preserve magnitude (Eqs. 75, 81, 88, 103). ``gains``: learned gains, initially zero, on the
    conditioning of each block and on the output. ``uncertainty``: u(sigma) is learned and weights the loss (Eq. 21);
    without it u is 0 and the loss is that of Eq. 14.
    """

    ladder: Rung
    group_norm: GroupNorm
    bias: bool
    ones_channel: bool
    noise_embedding: NoiseEmbedding
    embedding_layers: int
    shift: bool
    attention: Attention
    init: Initialization
    label_scaling: bool
    weight_norm: bool
    forced_norm: bool
    pixel_norm: bool
    resample_first: bool
    widen_first: bool
    output_norm: bool
    mp_functions: bool
    gains: bool
    uncertainty: bool

    def __post_init__(self) -> None:
        if self.embedding_layers not in (1, 2):
            raise InputError(f"embedding_layers must be 1 or 2, got {self.embedding_layers!r}")
        for field in fields(self):
            if field.type is bool and not isinstance(value := getattr(self, field.name), bool):
                raise InputError(
                    f"{field.name} must be True or False, got {value!r}: leave it out for the value of the rung"
                )

    @property
    def fan_in_scaled(self) -> bool:
        """Whether weights are stored with unit root mean square and layers divide them by sqrt(fan-in)."""
        return self.weight_norm or self.forced_norm or self.init is Initialization.NORMAL


_ENUMS: dict[str, type[StrEnum]] = {
    "group_norm": GroupNorm,
    "noise_embedding": NoiseEmbedding,
    "attention": Attention,
    "init": Initialization,
}


@dataclass(frozen=True, kw_only=True)
class RungTraining:
    """How the paper trained a rung, on latents of ImageNet-512 at 64x64x4.

    ``decay`` is t_ref in batches, 0 for no decay. ``half_life`` of a traditional average is in images; None for
    power-function averages. ``clip_act`` is not in the paper, see docs/departures.md.
    """

    batch: int
    lr: float
    decay: float
    betas: tuple[float, float]
    dropout: float
    loss_scaling: float
    P_mean: float
    P_std: float
    half_life: int | None
    attn_resolutions: tuple[int, ...]
    clip_act: float | None


_A = Switches(
    ladder="A",
    group_norm=GroupNorm.AFFINE,
    bias=True,
    ones_channel=False,
    noise_embedding=NoiseEmbedding.POSITIONAL,
    embedding_layers=2,
    shift=True,
    attention=Attention.DOT,
    init=Initialization.HE_ZERO,
    label_scaling=False,
    weight_norm=False,
    forced_norm=False,
    pixel_norm=False,
    resample_first=False,
    widen_first=False,
    output_norm=True,
    mp_functions=False,
    gains=False,
    uncertainty=False,
)
_A_TRAINING = RungTraining(
    batch=4096,
    lr=0.0001,
    decay=0,
    betas=(0.9, 0.999),
    dropout=0.1,
    loss_scaling=100.0,
    P_mean=-1.2,
    P_std=1.2,
    half_life=50_000_000,
    attn_resolutions=(32, 16, 8),
    clip_act=None,
)

# Changes of each rung to the one before: of the network, and of its training
_STEPS: dict[Rung, tuple[dict[str, Any], dict[str, Any]]] = {
    "B": (
        {"uncertainty": True},
        {"batch": 2048, "lr": 0.0002, "betas": (0.9, 0.99), "P_mean": -0.4, "P_std": 1.0, "half_life": None,
         "attn_resolutions": (16, 8)},
    ),
    "C": (
        {"group_norm": GroupNorm.PLAIN, "bias": False, "ones_channel": True, "shift": False,
         "noise_embedding": NoiseEmbedding.FOURIER, "attention": Attention.COSINE, "init": Initialization.HE,
         "label_scaling": True},
        {},
    ),
    "D": ({"weight_norm": True, "init": Initialization.NORMAL}, {"lr": 0.0100, "loss_scaling": 1.0}),
    "E": ({"forced_norm": True}, {"decay": 70000}),
    "F": (
        {"group_norm": GroupNorm.NONE, "pixel_norm": True, "resample_first": True, "widen_first": True,
         "output_norm": False, "embedding_layers": 1},
        {},
    ),
    "G": ({"mp_functions": True, "gains": True}, {"dropout": 0.0, "clip_act": 256.0}),
}  # fmt: skip

LADDER: dict[Rung, Switches] = {"A": _A}
LADDER_TRAINING: dict[Rung, RungTraining] = {"A": _A_TRAINING}
for _below, _rung in pairwise(RUNGS):
    LADDER[_rung] = replace(LADDER[_below], ladder=_rung, **_STEPS[_rung][0])
    LADDER_TRAINING[_rung] = replace(LADDER_TRAINING[_below], **_STEPS[_rung][1])


def rung(name: str, /) -> Switches:
    """The switches of CONFIG ``name``. Raises InputError for an unknown name."""
    if name not in LADDER:
        raise InputError(f"ladder must be one of {', '.join(LADDER)}, got {name!r}: G is the paper's last")
    return LADDER[name]


def with_switches(switches: Switches, /, **changes: Any) -> Switches:
    """``switches`` with some replaced; members of enums may be given as their values, as in JSON.

    Raises InputError for a value that the switch does not have.
    """
    for name in changes.keys() & _ENUMS.keys():
        if changes[name] not in list(_ENUMS[name]):
            raise InputError(f"{name} must be one of {', '.join(_ENUMS[name])}, got {changes[name]!r}")
        changes[name] = _ENUMS[name](changes[name])
    return replace(switches, **changes)
