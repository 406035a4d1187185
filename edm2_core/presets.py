"""Presets: published networks with their training hyperparameters, and ``digits`` for a first run.

Source: arXiv 2312.02696 Table 6 and Appendix D; 64-pixel rows from its ImageNet-64 section. Rows marked "ours" are not
in the paper: XXS in both, XS and XXL at 64 pixels. Their learning rate is 0.0120 sqrt(128 / channels), which the
published rates follow within 3 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, isfinite
from typing import Any

from .ema import Length
from .errors import InputError
from .ladder import LADDER, LADDER_TRAINING, Rung
from .network import NetworkConfig

Ki, Mi = 1 << 10, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How a network is trained. ``decay`` is in batches; durations and intervals are in images.

    Raises:
        InputError: a value is out of range, or two averages would have the same file name.
    """

    duration: int = 64 * Ki
    """Images to train on in all, such as 96, 192Ki, 8Mi or 2Gi."""
    batch: int = 128
    """Images per step, on all devices together."""
    lr: float = 0.0100
    """Reference learning rate."""
    decay: float = 0
    """Batches after which the learning rate decays as 1 / sqrt(time); 0 disables the decay."""
    rampup: int = 0
    """Images over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's running means of gradients and of their squares."""
    P_mean: float = -0.4
    """Mean of ln(sigma) in training."""
    P_std: float = 1.0
    """Standard deviation of ln(sigma) in training."""
    loss_scaling: float = 1.0
    """Factor on the loss while gradients are computed, against underflow in float16."""
    sigma_rels: tuple[float, ...] = (0.05, 0.10)
    """Relative lengths of the averages to track, each within (0, 0.2887)."""
    half_life: int | None = None
    """Half-life in images of a traditional average, tracked instead of --sigma-rels."""
    snapshot: int = 4 * Ki
    """Images between snapshots of the averages."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Lengths of the tracked averages."""
        return tuple(map(Length.of, self.sigma_rels)) if self.half_life is None else (Length.half_life(self.half_life),)

    @property
    def of_step(self) -> dict[str, Any]:
        """Keyword arguments of a port's training step."""
        return {"betas": self.betas, "loss_scaling": self.loss_scaling, "sigma_rels": self.lengths}


KIMG = 1000  # snapshots are named by thousands of images
_LEAST = {"duration": 1, "batch": 1, "decay": 0, "rampup": 0, "half_life": 1, "snapshot": KIMG}


def _check(hyper: Hyperparameters) -> None:
    for name, least in _LEAST.items():
        if (value := getattr(hyper, name)) is not None and not value >= least:
            why = ": snapshots are named by thousands of images" if least == KIMG else ""
            raise InputError(f"{name} must be at least {least}, got {value}{why}")
        if value is not None and not value < 1 << 53:
            raise InputError(f"{name} must be less than 2^53, as the clock of the averages, got {str(value)[:24]}")
    for name in ("lr", "P_std", "loss_scaling"):
        if not 0 < (value := getattr(hyper, name)) < inf:
            raise InputError(f"{name} must be positive and finite, got {value}")
    if not isfinite(hyper.P_mean):
        raise InputError(f"P_mean must be finite, got {hyper.P_mean}")
    if len(hyper.betas) != 2 or not all(0 <= beta < 1 for beta in hyper.betas):
        raise InputError(f"betas must be two numbers within [0, 1), got {hyper.betas}: 0.9 0.99 is the paper's")
    if not hyper.lengths:
        raise InputError("sigma_rels must be one or more lengths, got none: 0.05 0.10 lets you choose any afterwards")
    for one, other in combinations(hyper.sigma_rels, 2):
        if f"{one:.3f}" == f"{other:.3f}":
            raise InputError(f"sigma_rels must differ in their first three digits, got {one} and {other}: drop one")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A network and its training hyperparameters.

    ``any_data``: resolution and channels of the network are those of the data; otherwise the data must have its own.
    """

    network: NetworkConfig
    hyper: Hyperparameters
    any_data: bool = False


# size: channels, lr, dropout, duration at 512 and at 64, in Mi images
_SIZES = {
    "xxs": (64, 0.0170, 0.0, 2048, 1024),  # ours
    "xs": (128, 0.0120, 0.0, 2048, 1024),  # 64 pixels: ours
    "s": (192, 0.0100, 0.0, 2048, 1024),
    "m": (256, 0.0090, 0.1, 2048, 2048),
    "l": (320, 0.0080, 0.1, 1792, 1024),
    "xl": (384, 0.0070, 0.1, 1280, 640),
    "xxl": (448, 0.0065, 0.1, 896, 448),  # 64 pixels: ours
}
# task: channels of an image, index of the duration, t_ref, P_mean, P_std
_TASKS = {"img512": (4, 3, 70000, -0.4, 1.0), "img64": (3, 4, 35000, -0.8, 1.6)}


def _published() -> Iterator[tuple[str, Preset]]:
    for task, (img_channels, duration, decay, p_mean, p_std) in _TASKS.items():
        for size, row in _SIZES.items():
            network = NetworkConfig(
                img_resolution=64, img_channels=img_channels, label_dim=1000, model_channels=row[0], dropout=row[2]
            )
            yield (
                f"{task}-{size}",
                Preset(
                    network=network,
                    hyper=Hyperparameters(
                        duration=int(row[duration]) * Mi,
                        batch=2048,
                        lr=row[1],
                        decay=decay,
                        rampup=10_000_000,
                        P_mean=p_mean,
                        P_std=p_std,
                        snapshot=8 * Mi,
                    ),
                ),
            )


_DIGITS = Preset(  # ours
    network=NetworkConfig(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=32,
        channel_mult=(1, 1),
        num_blocks=1,
        attn_resolutions=(),
        channels_per_head=32,
        logvar_channels=32,
    ),
    hyper=Hyperparameters(lr=0.0500, decay=200, rampup=4 * Ki, P_std=1.2),
    any_data=True,
)

PRESETS: dict[str, Preset] = {"digits": _DIGITS, **dict(_published())}
AUTO, CUSTOM = "auto", "custom"
"""Names, in a config, of :func:`recipe` and of a network that is the user's own."""


def takes_any_data(name: str, /) -> bool:
    """Whether the network of a preset takes the size of the data. Raises InputError for an unknown name."""
    return name in (AUTO, CUSTOM) or preset(name).any_data


def recipe(count: int, shape: tuple[int, int, int], /, *, labels: bool) -> Preset:
    """Network and hyperparameters for ``count`` images of ``shape``, channels, height and width.

    The fewer images, the smaller the network and the shorter its training, with dropout; from a million on, the paper's
    S for 800 epochs. The learning rate follows the width as the published ones do (see the module). Levels
    halve images until their shorter side is at most 8, and attend where the longer one is at most 16.

    Source: ours; up to 10,000 images by the measurements in docs/small_data.md, beyond by hand.
    """
    channels, height, width = shape
    halvings = 0
    while min(height, width) > 8 << halvings and halvings < 3:
        halvings += 1
    size = next(size for most, size in _RECIPES if count <= most)
    lowest = -(-max(height, width) >> halvings)  # the longer side of the last level, padded
    attended = tuple(lowest << level for level in range(halvings + 1) if lowest << level <= 16)
    network = NetworkConfig(
        img_resolution=(height, width),
        img_channels=channels,
        pad=True,
        label_dim=2 if labels else 0,  # that of the data follows
        model_channels=size.channels,
        channel_mult=(1, 2, 3, 4)[: halvings + 1] if size.channels >= 64 else (1, *[2] * halvings),
        num_blocks=size.blocks,
        attn_resolutions=attended,
        channels_per_head=min(size.channels, 64),
        dropout=size.dropout,
    )
    epochs = size.epochs
    duration = max(round(count * epochs / Ki), 8) * Ki
    return Preset(
        network=network,
        hyper=Hyperparameters(
            duration=duration,
            batch=size.batch,
            lr=0.0120 * (128 / size.channels) ** 0.5,
            decay=duration / size.batch / 4,
            rampup=duration // 16,
            P_mean=-0.4,
            P_std=1.2,
            snapshot=max(KIMG, duration // 16),
        ),
        any_data=True,
    )


@dataclass(frozen=True)
class _Size:
    channels: int
    blocks: int
    dropout: float
    epochs: float
    batch: int


# the most images, and the network for as many
_RECIPES = (
    (1000, _Size(32, 1, 0.1, 100, 64)),
    (10_000, _Size(64, 2, 0.1, 40, 128)),
    (100_000, _Size(64, 3, 0.1, 200, 256)),
    (1_000_000, _Size(128, 3, 0.1, 400, 1024)),
    (inf, _Size(192, 3, 0.0, 800, 2048)),
)


def on_rung(base: Preset, rung: Rung, /) -> Preset:
    """The preset ``base``, which is on CONFIG G, on another rung of the ladder. Source: Figures 16 to 22.

    Batch, learning rate, and half-life over duration are scaled by the factors between the paper's rungs, so img512-s
    gives the paper's table. Dropout, clipping, betas and loss scaling are the rung's. CONFIG A also has attention at
    32x32 and its own distribution of noise levels. Everything else is kept.
    """
    if rung == "G":
        return base
    paper, last = LADDER_TRAINING[rung], LADDER_TRAINING["G"]
    added = set(paper.attn_resolutions) - set(last.attn_resolutions)
    network = replace(
        base.network,
        switches=LADDER[rung],
        attn_resolutions=tuple(sorted({*base.network.attn_resolutions, *added}, reverse=True)),
        dropout=paper.dropout,
        clip_act=paper.clip_act,
    )
    hyper, other_noise = base.hyper, paper.P_mean != last.P_mean
    return replace(
        base,
        network=network,
        hyper=replace(
            hyper,
            batch=hyper.batch * paper.batch // last.batch,
            lr=hyper.lr * paper.lr / last.lr,
            decay=hyper.decay if paper.decay else 0,
            P_mean=paper.P_mean if other_noise else hyper.P_mean,
            P_std=paper.P_std if other_noise else hyper.P_std,
            betas=paper.betas,
            loss_scaling=paper.loss_scaling,
            half_life=paper.half_life and round(hyper.duration * paper.half_life / (2048 * Mi)),
        ),
    )


def preset(name: str, /) -> Preset:
    """The preset called ``name``. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
