"""Published networks and their training hyperparameters, one line each, and ``digits`` for a first run.

Source: arXiv 2312.02696 Table 6 and Appendix D; 64-pixel rows from its ImageNet-64 section. Rows marked "ours" are not
in the paper: XXS in both, XS and XXL at 64 pixels. Their learning rate continues the published trend 0.0120 sqrt(128 /
channels), which the published rates follow to 3 %.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .errors import InputError
from .ladder import LADDER_TRAINING, Rung
from .network import NetworkConfig

Ki, Mi = 1 << 10, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A network and how to train it. ``decay`` is t_ref in batches; every other length is in images.

    ``P_mean`` and ``P_std`` are of ln(sigma); ``snapshot`` is how often the averages are stored; ``betas`` are Adam's.
    ``half_life`` is that of a traditional average, None for averages of power-function profile.
    """

    network: NetworkConfig
    duration: int
    batch: int
    lr: float
    decay: float
    rampup: int
    P_mean: float
    P_std: float
    snapshot: int
    betas: tuple[float, float] = (0.9, 0.99)
    loss_scaling: float = 1.0
    half_life: int | None = None


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
                    duration=int(row[duration]) * Mi,
                    batch=2048,
                    lr=row[1],
                    decay=decay,
                    rampup=10_000_000,
                    P_mean=p_mean,
                    P_std=p_std,
                    snapshot=8 * Mi,
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
    duration=64 * Ki,
    batch=128,
    lr=0.0500,
    decay=200,
    rampup=4 * Ki,
    P_mean=-0.4,
    P_std=1.2,
    snapshot=4 * Ki,
)

PRESETS: dict[str, Preset] = {"digits": _DIGITS, **dict(_published())}


def on_rung(base: Preset, rung: Rung, /) -> Preset:
    """``base``, which is on CONFIG G, as the paper trained another rung of the ladder (Figures 16 to 22).

    What the paper changes as a number is changed by the same factor: batch, learning rate, half-life over duration. So
    of img512-s comes the paper's own table; the presets' other choices stay. Dropout and clipping are the rung's, and
    CONFIG A attends at 32x32 too and has noise levels of its own.
    """
    if rung == "G":
        return base
    paper, last = LADDER_TRAINING[rung], LADDER_TRAINING["G"]
    more = set(paper.attn_resolutions) - set(last.attn_resolutions)
    network = replace(
        base.network,
        ladder=rung,
        attn_resolutions=tuple(sorted({*base.network.attn_resolutions, *more}, reverse=True)),
        dropout=paper.dropout,
        clip_act=paper.clip_act,
    )
    noise = (base.P_mean, base.P_std) if paper.P_mean == last.P_mean else (paper.P_mean, paper.P_std)
    return replace(
        base,
        network=network,
        batch=base.batch * paper.batch // last.batch,
        lr=base.lr * paper.lr / last.lr,
        decay=base.decay if paper.decay else 0,
        P_mean=noise[0],
        P_std=noise[1],
        betas=paper.betas,
        loss_scaling=paper.loss_scaling,
        half_life=paper.half_life and round(base.duration * paper.half_life / (2048 * Mi)),
    )


def preset(name: str, /) -> Preset:
    """The preset of that name. Raises InputError, listing the names, where there is none."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
