"""The network as data: configs and their errors, plans, counts, initial weights, presets (SPEC NET)."""

import json
from dataclasses import replace
from math import inf, nan, pi, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.clauses import proves
from edm2_core import reference
from edm2_core.errors import InputError
from edm2_core.ladder import LADDER, LADDER_TRAINING, Initialization, NoiseEmbedding, Rung
from edm2_core.network import (
    Block,
    NetworkConfig,
    check_parameters,
    initialize,
    multiply_adds,
    parameter_count,
    plan,
)
from edm2_core.presets import PRESETS, on_rung, preset

BASE = NetworkConfig(img_resolution=8, img_channels=1, model_channels=16, channel_mult=(1, 2), channels_per_head=16)


@proves("NET-1", "API-4")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_resolution": 6, "channel_mult": (1, 2, 2)}, r"divisible by 4 \(3 levels halve it 2 times\), got 6"),
        ({"img_resolution": 0}, r"img_resolution must be a whole number of at least 1, or two of them, got 0"),
        ({"img_resolution": (8, 4, 2)}, r"img_resolution must be a whole number .* got \(8, 4, 2\)"),
        ({"img_resolution": (8, 7)}, r"img_resolution must be divisible by 2 .* got \(8, 7\): set pad"),
        ({"cond_channels": -1}, r"cond_channels must be a whole number >= 0, got -1"),
        ({"pad": 1}, r"pad must be True or False, got 1"),
        ({"img_channels": 1.5}, r"img_channels must be a whole number .* got 1.5"),
        ({"label_dim": -1}, r"label_dim must be a whole number >= 0, got -1"),
        ({"channel_mult": ()}, r"channel_mult must be one or more positive numbers, got \(\)"),
        ({"channels_per_head": 10}, r"equal heads of at least channels_per_head, got 32 at 4x4 with 10 per head"),
        ({"channels_per_head": 32, "attn_resolutions": (8,)}, r"got 16 at 8x8 with 32 per head"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter must be an even number of finite taps"),
        ({"resample_filter": (1, inf)}, r"resample_filter must be an even number of finite taps"),
        ({"res_balance": 1.5}, r"res_balance must be within \[0, 1\], got 1.5"),
        ({"label_balance": nan}, r"label_balance must be within \[0, 1\], got nan"),
        ({"dropout": 1.0}, r"dropout must be within \[0, 1\), got 1.0"),
        ({"sigma_data": 0.0}, r"sigma_data must be positive, got 0.0"),
        ({"clip_act": 0.0}, r"clip_act must be positive or None, got 0.0"),
        ({"channel_mult_noise": 0.0}, r"channel_mult_noise must be positive, got 0.0"),
        ({"channel_mult_emb": 0.0}, r"channel_mult_emb must be positive, got 0.0"),
        ({"ladder": "H"}, r"ladder must be one of A, B, C, D, E, F, G, got 'H'"),
        ({"group_norm": "batch"}, r"group_norm must be one of affine, plain, none, got 'batch'"),
        ({"embedding_layers": 3}, r"embedding_layers must be 1 or 2, got 3"),
        ({"bias": 1}, r"bias must be True or False, got 1"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        replace(BASE, **change)
    assert "\n" not in str(caught.value)


@proves("NET-1")
def test_config_takes_what_json_brings() -> None:
    """Lists become tuples, so that equal configs are equal and a plan is made once."""
    assert replace(BASE, channel_mult=[1, 2]) == BASE  # type: ignore[arg-type]
    assert plan(replace(BASE, channel_mult=[1, 2])) is plan(BASE)  # type: ignore[arg-type]


@proves("NET-2")
@given(draw.configs())
def test_plan_is_a_walk(config: NetworkConfig) -> None:
    """Widths and resolutions fit together from block to block, and every skip is used once, newest first."""
    walk = plan(config)
    first = walk.encoder[0]
    inputs = config.img_channels + config.cond_channels + config.switches.ones_channel
    assert (first.role, first.in_channels, first.size) == ("conv", inputs, config.level_sizes[0])
    width, size, skips = first.out_channels, first.size, [first]
    for block in walk.encoder[1:]:
        check_step(block, "enc", width, size)
        width, size = block.out_channels, block.size
        skips.append(block)
    assert size == config.level_sizes[-1]
    for block in walk.decoder:
        if block.takes_skip:
            skip = skips.pop()
            assert skip.size == block.size
            width += skip.out_channels
        check_step(block, "dec", width, size)
        width, size = block.out_channels, block.size
    assert not skips
    assert (size, width) == (config.level_sizes[0], config.level_channels[0])
    names = [block.name for block in (*walk.encoder, *walk.decoder)]
    assert len(set(names)) == len(names)


def check_step(block: Block, role: str, width: int, size: tuple[int, int]) -> None:
    assert (block.role, block.in_channels) == (role, width)
    factor = {"keep": 1, "down": 0.5, "up": 2}[block.resample]
    assert block.size == tuple(side * factor for side in size)


@proves("NET-2")
@given(draw.configs())
def test_attention_is_where_the_config_says(config: NetworkConfig) -> None:
    """In the blocks of the chosen resolutions and always in the decoder's first; never where the resolution changes."""
    for block in (*plan(config).encoder, *plan(config).decoder):
        chosen = max(block.size) in config.attn_resolutions and "_block" in block.name
        assert bool(block.heads) == (chosen or block.name.endswith("_in0"))
        if block.heads:
            assert block.heads == block.out_channels // config.channels_per_head
            assert block.out_channels % block.heads == 0


class Read(dict[str, Any]):
    """Parameters that remember which of them were asked for."""

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__(params)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


@proves("NET-2")
@draw.fewer(2)
@given(draw.configs(), draw.seeds)
def test_table_is_what_the_network_reads(config: NetworkConfig, seed: int) -> None:
    """The network reads every parameter of the table and no other."""
    params, batch = Read(draw.random_parameters(config, seed)), draw.random_batch(config, seed)
    reference.denoise(config, params, batch.images, batch.sigma, *batch.rest)
    assert params.names == set(plan(config).parameters)


@proves("NET-3")
@given(draw.configs())
def test_parameter_count_is_the_tables(config: NetworkConfig) -> None:
    """parameter_count counts trained scalars, without those of u(sigma)."""
    params = initialize(config, seed=0)
    counted = sum(
        value.size for name, value in params.items() if not name.startswith("logvar") and "fourier" not in name
    )
    assert parameter_count(config) == counted


# Table 6, 512 latents: Mparams as printed; Table 1 has CONFIG G (the size S) to a further digit
@proves("NET-3")
@pytest.mark.parametrize(
    ("size", "millions", "digits"),
    [("xs", 125, 0), ("s", 280.2, 1), ("m", 498, 0), ("l", 777, 0), ("xl", 1119, 0), ("xxl", 1523, 0)],
)
def test_published_parameter_counts(size: str, millions: float, digits: int) -> None:
    assert round(parameter_count(preset(f"img512-{size}").network) / 1e6, digits) == millions


@proves("NET-3")
@pytest.mark.parametrize(
    ("size", "printed"), [("xs", 46), ("s", 102), ("m", 181), ("l", 282), ("xl", 406), ("xxl", 552)]
)
def test_published_multiply_adds(size: str, printed: int) -> None:
    """The paper's Gflops also count elementwise work, up to 2 % more."""
    assert 0.98 <= multiply_adds(preset(f"img512-{size}").network) / 1e9 / printed <= 1


# Table 1 and Figures 16 to 22: Mparams, Gflops, blocks that attend
PUBLISHED = {
    "A": (295.9, 110.4, 22),
    "B": (291.8, 100.4, 15),
    "C": (277.8, 100.3, 15),
    "D": (277.8, 101.2, 15),
    "E": (277.8, 101.2, 15),
    "F": (280.2, 102.1, 15),
    "G": (280.2, 102.2, 15),
}


@proves("NET-3", "NET-10")
@pytest.mark.parametrize("rung", PUBLISHED)
def test_the_ladder_is_figures_16_to_22(rung: Rung) -> None:
    """Parameters to the printed digit, Gflops within 2 %, and the number of blocks with attention."""
    millions, giga, attending = PUBLISHED[rung]
    config = NetworkConfig(img_resolution=64, img_channels=4, label_dim=1000, ladder=rung)
    assert round(parameter_count(config) / 1e6, 1) == millions
    assert 0.98 <= multiply_adds(config) / 1e9 / giga <= 1
    assert sum(block.heads > 0 for block in (*plan(config).encoder, *plan(config).decoder)) == attending


@proves("NET-10")
def test_a_rung_of_a_preset_is_trained_as_the_paper_did() -> None:
    """The rungs of img512-s have the hyperparameters of Figures 16 to 22; rung G of a preset is the preset itself."""
    for rung, paper in LADDER_TRAINING.items():
        one = on_rung(preset("img512-s"), rung)
        for name in ("batch", "lr", "decay", "betas", "loss_scaling", "P_mean", "P_std"):
            assert getattr(one.hyper, name) == pytest.approx(getattr(paper, name)), (rung, name)
        network, half_life = one.network, one.hyper.half_life
        assert (network.attn_resolutions, network.dropout) == (paper.attn_resolutions, paper.dropout)
        assert half_life == (pytest.approx(paper.half_life, rel=1e-3) if paper.half_life else None)
        assert network.switches == LADDER[rung]
    assert all(on_rung(one, "G") is one for one in PRESETS.values())


@proves("NET-10")
@given(draw.switches())
def test_a_switch_is_set_alone(chosen: dict[str, Any]) -> None:
    """A switch overrides its rung's value, also in the plan and after a round trip through JSON."""
    config = NetworkConfig(**BASE.to_json() | chosen)
    for name, value in vars(LADDER[config.ladder]).items():
        assert getattr(plan(config).switches, name) == chosen.get(name, value)
    assert NetworkConfig(**json.loads(json.dumps(config.to_json()))) == config
    assert replace(config, switches=LADDER["C"]).switches == LADDER["C"]
    assert replace(config, num_blocks=2).switches == config.switches


# alpha_ref, dropout and duration (Mi images) at 512; duration at 64
TABLE_6 = {
    "xs": (128, 0.0120, 0.0, 2048, None),
    "s": (192, 0.0100, 0.0, 2048, 1024),
    "m": (256, 0.0090, 0.1, 2048, 2048),
    "l": (320, 0.0080, 0.1, 1792, 1024),
    "xl": (384, 0.0070, 0.1, 1280, 640),
    "xxl": (448, 0.0065, 0.1, 896, None),
}


@proves("NET-3")
@pytest.mark.parametrize("size", TABLE_6)
def test_presets_are_table_6(size: str) -> None:
    """The hyperparameters of each published network."""
    channels, lr, dropout, at_512, at_64 = TABLE_6[size]
    latents, pixels = preset(f"img512-{size}"), preset(f"img64-{size}")
    for one, network_channels, decay, noise in ((latents, 4, 70000, (-0.4, 1.0)), (pixels, 3, 35000, (-0.8, 1.6))):
        net = one.network
        assert (net.img_resolution, net.img_channels, net.label_dim) == (64, network_channels, 1000)
        assert (net.model_channels, net.channel_mult, net.num_blocks) == (channels, (1, 2, 3, 4), 3)
        assert (net.attn_resolutions, net.channels_per_head, net.dropout) == ((16, 8), 64, dropout)
        hyper = one.hyper
        assert (hyper.lr, hyper.batch, hyper.decay, (hyper.P_mean, hyper.P_std)) == (lr, 2048, decay, noise)
    assert latents.hyper.duration == at_512 << 20
    assert at_64 is None or pixels.hyper.duration == at_64 << 20


@proves("API-4", "NET-1")
def test_unknown_preset() -> None:
    with pytest.raises(InputError, match=r"preset must be one of digits, .*img512-xs.*, got 'img512-s9'"):
        preset("img512-s9")
    assert preset("digits") is PRESETS["digits"]


@proves("NET-4")
@draw.fewer(2)
@given(draw.configs(), st.integers(0, 2**63))
def test_initialization_depends_on_seed_and_name_alone(config: NetworkConfig, seed: int) -> None:
    """The same seed gives the same values, another seed others, whatever the other parameters are."""
    params, again, other = (initialize(config, seed=s) for s in (seed, seed, seed + 1))
    assert {name: value.shape for name, value in params.items()} == {
        name: p.shape for name, p in plan(config).parameters.items()
    }
    wider = replace(config, num_blocks=config.num_blocks + 1)
    grown, table = initialize(wider, seed=seed), plan(config).parameters
    for name, value in params.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, again[name])
        fixed = table[name].init in ("zeros", "ones", "positions", "quadratures")
        assert np.array_equal(value, other[name]) == fixed
        assert plan(wider).parameters[name] != table[name] or np.array_equal(value, grown[name])
    check_parameters(config, params)


@proves("NET-4")
@pytest.mark.parametrize("init", Initialization)
def test_initial_distributions(init: Initialization) -> None:
    """Means and mean squares to 6 standard errors; zeros and ones exactly."""
    switches = replace(LADDER["A"], init=init, noise_embedding=NoiseEmbedding.FOURIER, gains=True)
    config = replace(preset("img512-xxs").network, switches=switches)
    params, table = initialize(config, seed=3), plan(config).parameters
    for name, value in params.items():
        if table[name].init in ("zeros", "ones"):
            assert np.all(value == (table[name].init == "ones"))
            continue
        turns = value / (2 * pi)
        if name.endswith("phases"):
            assert 0 <= turns.min() <= turns.max() <= 1
            assert np.mean(turns) == pytest.approx(0.5, abs=6 * (1 / 12 / turns.size) ** 0.5)
            continue
        he = table[name].init == "he"
        x = turns if name.endswith("freqs") else value * sqrt(table[name].fan_in / 2) if he else value
        assert np.mean(x) == pytest.approx(0, abs=6 * x.size**-0.5)
        kurtosis = 1.8 if he else 3.0
        assert np.mean(x.astype(np.float64) ** 2) == pytest.approx(
            1, abs=tolerance.mean_square(x.size, kurtosis=kurtosis)
        )
    last = {name for name, p in table.items() if p.kind == "weight" and p.init == "zeros"}
    ends = ("conv_res1.weight", "attn_proj.weight", "out_conv.weight")
    assert last == ({name for name in table if name.endswith(ends)} if init is Initialization.HE_ZERO else set())
    assert table["unet.emb_label.weight"].init == ("he" if init is Initialization.HE else "normal")


@proves("NET-4")
def test_positional_features_are_cosines_and_sines() -> None:
    """Of the angles x 10000^(-i / n), cosines first; at odd widths too."""
    for channels in (8, 7):
        switches = replace(BASE.switches, noise_embedding=NoiseEmbedding.POSITIONAL)
        config = replace(BASE, switches=switches, model_channels=channels, channels_per_head=channels)
        params, n = initialize(config, seed=0), (channels + 1) // 2
        angles = -1.7 * 10000.0 ** -(np.arange(n) / n)
        wanted = np.concatenate([np.cos(angles), np.sin(angles)])[:channels]
        got = np.cos(-1.7 * params["unet.emb_fourier.freqs"] + params["unet.emb_fourier.phases"])
        assert got == pytest.approx(wanted, abs=4 * tolerance.eps("float32"))


@proves("API-4", "NET-2")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.out_gain": None}, r"unet.out_gain is missing: use the config they were made with"),
        ({"unet.out_gain": np.zeros(1)}, r"unet.out_gain must have shape \(\), got \(1,\)"),
        ({"unet.more": np.zeros(1)}, r"unet.more is none"),
    ],
)
def test_parameters_are_checked(change: dict[str, Any], message: str) -> None:
    params = {name: value for name, value in (initialize(BASE, seed=0) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        check_parameters(BASE, params)
