"""The reference network: the same in every library, and the properties that make it EDM2's (SPEC NET)."""

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conformance import strategies as draw
from conformance import tolerance
from conformance.clauses import proves
from conformance.libraries import Library, check_same_kind, each_library, to_numpy
from edm2_core import reference
from edm2_core.mp import mp_cat, normalize
from edm2_core.network import NetworkConfig, initialize, plan

# everything once: a padded rectangle, a condition, labels, attention, a wider filter, widths that change, clipping;
# small, for JAX compiles it
CONFIG = NetworkConfig(
    img_resolution=(3, 4),
    img_channels=2,
    cond_channels=1,
    pad=True,
    label_dim=3,
    model_channels=6,
    channel_mult=(1, 1.5),
    num_blocks=1,
    attn_resolutions=(2,),
    channels_per_head=3,
    resample_filter=(1, 3, 3, 1),
    clip_act=2.0,
    logvar_channels=5,
)


@proves("API-1", "NET-5", "LOSS-3")
@each_library
def test_reference_in_library(library: Library) -> None:
    """float32 in each library against float64 NumPy."""

    def both(params: Any, images: Any, unit_noise: Any, sigma: Any, *rest: Any) -> tuple[Any, ...]:
        answers = reference.denoise(CONFIG, params, images + unit_noise * sigma, sigma, *rest)
        return *answers, reference.loss(CONFIG, params, images, unit_noise, sigma, *rest)

    run = library.compiled(both)

    @draw.fewer(4)
    @given(draw.seeds)
    def check(seed: int) -> None:
        params, batch = draw.random_parameters(CONFIG, seed), draw.random_batch(CONFIG, seed)
        images = library.array(batch.images)
        got = run(library.arrays(params), images, *map(library.array, batch[1:]))
        wanted = both(*draw.wide((params, *batch)))
        check_same_kind(got, images)
        forward, backward = tolerance.network(CONFIG), tolerance.gradient(CONFIG, batch.sigma, batch.images)
        for out, want, allowed in zip(got, wanted, (forward, forward, backward), strict=True):
            assert tolerance.relative(to_numpy(out), want) <= allowed

    check()


def float64_case(config: NetworkConfig, seed: int, size: int) -> Any:
    """Parameters, x, sigma, labels, condition."""
    batch = draw.random_batch(config, seed, size=size)
    return draw.wide((draw.random_parameters(config, seed), batch.noisy, batch.sigma, batch.labels, batch.condition))


@proves("NET-5")
@draw.fewer(2)
@given(draw.configs(), draw.seeds)
def test_shapes(config: NetworkConfig, seed: int) -> None:
    """For any config."""
    denoised, logvar = reference.denoise(config, *float64_case(config, seed, 3))
    assert denoised.shape == (3, config.img_channels, *config.image_size)
    assert logvar.shape == (3, 1, 1, 1)
    assert denoised.dtype == logvar.dtype == np.float64


@proves("NET-5")
@draw.fewer(2)
@given(draw.configs(ladder=st.just({"gains": True})), draw.seeds)
def test_without_output_gain_the_network_is_its_skip(config: NetworkConfig, seed: int) -> None:
    """D = c_skip x where the gain is 0, as at initialization; D - c_skip x is linear in the gain."""
    params, x, sigma, *rest = float64_case(config, seed, 2)
    skip = config.sigma_data**2 / (sigma**2 + config.sigma_data**2) * x
    by_gain = [
        reference.denoise(config, params | {"unet.out_gain": np.asarray(g)}, x, sigma, *rest)[0] - skip
        for g in (0.0, 1.0, -2.5)
    ]
    assert np.abs(by_gain[0]).max() <= 1e-15 * np.abs(x).max()
    assert np.allclose(by_gain[2], -2.5 * by_gain[1], rtol=0, atol=1e-12 * np.abs(x).max())


@proves("NET-7")
@draw.fewer(2)
@given(draw.configs(), draw.seeds)
def test_batch_independence(config: NetworkConfig, seed: int) -> None:
    params, x, sigma, *rest = float64_case(config, seed, 3)
    together, u = reference.denoise(config, params, x, sigma, *rest)
    for i in range(3):
        one = slice(i, i + 1)
        alone, u_alone = reference.denoise(
            config, params, x[one], sigma[one], *(r if r is None else r[one] for r in rest)
        )
        assert tolerance.relative(alone, together[one]) <= tolerance.network(config, "float64")
        assert tolerance.relative(u_alone, u[one], floor=1.0) <= tolerance.network(config, "float64")


@proves("NET-8")
@draw.fewer(2)
@given(draw.configs(labels=True), draw.seeds)
def test_no_label_is_the_zero_label(config: NetworkConfig, seed: int) -> None:
    """Another label changes the answer."""
    params, x, sigma, labels, condition = float64_case(config, seed, 2)
    params |= {name: np.abs(value) + 0.5 for name, value in params.items() if value.ndim == 0}
    without, _ = reference.denoise(config, params, x, sigma, None, condition)
    zero, _ = reference.denoise(config, params, x, sigma, np.zeros_like(labels), condition)
    with_label, _ = reference.denoise(config, params, x, sigma, labels, condition)
    assert np.array_equal(without, zero)
    assert not np.allclose(without, with_label, rtol=1e-9)


@proves("NET-6")
@given(draw.seeds, st.integers(1, 3), st.integers(2, 5))
def test_attention_head_by_head(seed: int, heads: int, width: int) -> None:
    """Oracle: loops over heads and pixels."""
    config = NetworkConfig(
        img_resolution=2, img_channels=1, model_channels=heads * width, channel_mult=(1,), channels_per_head=width
    )
    block = next(block for block in plan(config).decoder if block.heads)
    assert block.heads == heads
    rng, c = np.random.default_rng(seed), heads * width
    x = rng.standard_normal((1, c, 2, 2))
    qkv_weight, proj_weight = rng.standard_normal((3 * c, c, 1, 1)), rng.standard_normal((c, c, 1, 1))
    params = {f"{block.name}.attn_qkv.weight": qkv_weight, f"{block.name}.attn_proj.weight": proj_weight}
    qkv, pixels = reference.conv(x, qkv_weight)[0].reshape(3 * c, 4), []
    for pixel in range(4):
        channels = []
        for head in range(heads):
            rows = [(head * width + i) * 3 for i in range(width)]
            q, k, v = (normalize(qkv[[row + part for row in rows]], axis=0) for part in range(3))
            score = np.exp([q[:, pixel] @ k[:, other] / sqrt(width) for other in range(4)])
            channels.extend(v @ (score / score.sum()))
        pixels.append(channels)
    wanted = reference.conv(np.asarray(pixels).T.reshape(1, c, 2, 2), proj_weight)
    assert np.allclose(
        np.asarray(reference.attention(config, block, params, x)), np.asarray(wanted), rtol=0, atol=1e-12
    )


@proves("NET-5")
@given(draw.seeds, st.sampled_from([1, 3]))
def test_convolution_pixel_by_pixel(seed: int, size: int) -> None:
    """A correlation with zero padding."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((4, 3, size, size))
    effective = w / (1e-4 + np.sqrt(np.mean(w**2, axis=(1, 2, 3), keepdims=True))) / sqrt(3 * size**2)
    padded = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    wanted = np.empty((2, 4, 4, 5))
    for i, j in np.ndindex(4, 5):
        patch = padded[:, :, i : i + size, j : j + size]
        wanted[:, :, i, j] = np.einsum("ncij,ocij->no", patch, effective)
    assert np.allclose(reference.conv(x, w), wanted, rtol=0, atol=1e-12)


def block_outputs(config: NetworkConfig, params: Any, x: np.ndarray, c_noise: np.ndarray) -> Iterator[np.ndarray]:
    """What each block of the walk puts out, ahead of any output gain."""
    walk = plan(config)
    emb = reference.embedding(config, params, c_noise, None)
    skips: list[np.ndarray] = []
    x = np.concatenate([x, np.ones_like(x[:, :1])], axis=1)
    for block in (*walk.encoder, *walk.decoder):
        if block.role == "conv":
            x = np.asarray(reference.conv(x, params[f"{block.name}.weight"]))
        else:
            x = mp_cat(x, skips.pop(), axis=1, t=config.concat_balance) if block.takes_skip else x
            x = np.asarray(reference.run_block(config, block, params, x, emb))
        if block.role != "dec":
            skips.append(x)
        yield x


@proves("NET-9")
@draw.fewer(4)
@given(
    st.sampled_from([(1,), (1, 2), (2, 1)]),
    st.sampled_from([16, 24, 40]),
    st.integers(1, 3),
    st.sampled_from([(), (8,), (8, 16)]),
    draw.seeds,
)
def test_activations_have_near_unit_magnitude(
    mult: tuple[int, ...], channels: int, num_blocks: int, attention: tuple[int, ...], seed: int
) -> None:
    """For random plans, at any depth. Convolutions lose magnitude at borders, attention by averaging: a branch
    that came to nothing would leave 0.7 / sqrt(0.58) = 0.919 of the rms, the two of a block 0.845. Pixel norm begins
    each encoder block at 1; skips bring half of a decoder block's energy, so its rms a stays above the fixed point of
    a^2 = 0.845^2 (a^2 + 0.845^2) / 2, which is 0.63. The rest, on both sides, is chance: few channels, random weights.
    """
    config = NetworkConfig(
        img_resolution=8 * 2 ** (len(mult) - 1),
        img_channels=3,
        model_channels=channels,
        channel_mult=mult,
        num_blocks=num_blocks,
        attn_resolutions=attention,
        channels_per_head=8,
    )
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, *config.image_size))
    for out in block_outputs(config, draw.wide(initialize(config, seed=seed)), x, rng.standard_normal(2) / 4):
        assert 0.5 <= sqrt(np.mean(out**2)) <= 1.5


@proves("NET-5")
@given(draw.seeds)
def test_activations_are_clipped(seed: int) -> None:
    """Each block's output is clipped at clip_act."""
    config = replace(CONFIG, clip_act=0.5, label_dim=0, img_resolution=4, cond_channels=0)
    params, x, sigma, *_ = float64_case(config, seed, 2)
    outputs = list(block_outputs(config, params, 4 * x, np.log(sigma[:, 0, 0, 0]) / 4))
    assert all(np.abs(out).max() <= 0.5 for out in outputs[1:])
    assert any(np.abs(out).max() == 0.5 for out in outputs[1:])
