"""Cases of the network and of sampling: questions to a port, and the float64 reference's answers (NET, SAMPLE).

Every input is read-only, so a port that writes to one fails. Oracles are edm2_core.reference on float64 NumPy, and
central differences of it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from backends.pipeline.data import seeds as streams
from backends.pipeline.data.labels import one_hot
from conformance import measure, oracle, tolerance
from conformance import strategies as draw
from conformance.contract import PortCase
from conformance.ports import NotImplementedByPort, Subject
from conformance.strategies import wide
from edm2_core import reference, sampler
from edm2_core.network import NetworkConfig, initialize

NETWORK = "eps (4 layers + 8), tolerance.network"
SAMPLED = "network x sqrt(evaluations) x exp(pi / 2 x gain), tolerance.sampled"


def _same_answer(
    got: Any, wanted: Any, allowed: float, *, what: str = "the denoised images", why: str = NETWORK
) -> None:
    """Compare denoised and logvar; the error of logvar is relative to 1 at least."""
    measure.close(got[0], wanted[0], allowed, what=what, why=why)
    measure.close(got[1], wanted[1], allowed, what=f"logvar beside {what}", why=f"{why}, of 1 at least", floor=1.0)


def denoise(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed, P_std=2.0)
    got = port.denoise(config, params, batch.noisy, batch.sigma, *batch.rest)
    wanted = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *batch.rest)))
    _same_answer(got, wanted, tolerance.network(config))


def network_answer(port: Subject, config: NetworkConfig, seed: int) -> None:
    """The network's output F, from (D - c_skip x) / c_out at sigma = 80, where D is nearly all F."""
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    sigma = draw.frozen(np.full_like(batch.sigma, 80.0))
    x = draw.frozen(batch.unit_noise * sigma)
    denoised, _ = port.denoise(config, params, x, sigma, *batch.rest)
    wanted, _ = reference.denoise(config, *wide((params, x, sigma, *batch.rest)))
    skip = config.sigma_data**2 / (80.0**2 + config.sigma_data**2) * wide(x)
    got = (denoised - skip).astype(np.float32)
    measure.close(got, wanted - skip, 2 * tolerance.network(config), what="c_out F", why=f"2 {NETWORK}")


def fresh_network(port: Subject, config: NetworkConfig, seed: int) -> None:
    """At initialization gains are 0 and D is c_skip x."""
    params, batch = draw.frozen(initialize(config, seed=seed)), draw.random_batch(config, seed)
    got = port.denoise(config, params, batch.noisy, batch.sigma, *batch.rest)
    wanted = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *batch.rest)))
    _same_answer(got, wanted, tolerance.network(config), what="a fresh network's images")


def batch_independence(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed, size=3)
    together, u = port.denoise(config, params, batch.noisy, batch.sigma, *batch.rest)
    for i in range(3):
        one = slice(i, i + 1)
        image = batch.part(one)
        alone = port.denoise(config, params, image.noisy, image.sigma, *image.rest)
        _same_answer(alone, (together[one], u[one]), tolerance.network(config), what=f"image {i} of 3 by itself")


def no_label(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    without = port.denoise(config, params, batch.noisy, batch.sigma, *batch._replace(labels=None).rest)
    zero = batch._replace(labels=np.zeros_like(batch.labels))
    wanted = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *zero.rest)))
    _same_answer(without, wanted, tolerance.network(config), what="images without label")


def dropped_labels(port: Subject, config: NetworkConfig, seed: int) -> None:
    """Images with and without a label in one batch, as label dropout makes them in training."""
    params = draw.random_parameters(config, seed)
    batch = draw.random_batch(config, seed, size=3).with_a_dropped_label
    got = port.denoise(config, params, batch.noisy, batch.sigma, *batch.rest)
    wanted = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *batch.rest)))
    _same_answer(got, wanted, tolerance.network(config), what="images of a batch, one without label")
    one = slice(1, 2)
    image = batch.part(one)._replace(labels=None)
    alone = port.denoise(config, params, image.noisy, image.sigma, *image.rest)
    _same_answer(alone, (got[0][one], got[1][one]), tolerance.network(config), what="that image by itself")


def jvp(port: Subject, config: NetworkConfig, seed: int) -> None:
    config = replace(config, clip_act=None)  # a difference across the kink of a clip is wrong
    params, batch = draw.random_parameters(config, seed), draw.random_batch(config, seed)
    scale = np.sqrt(batch.sigma**2 + np.float32(config.sigma_data) ** 2)  # 1 / c_in makes the derivative as large as D
    tangent = draw.frozen(draw.normal(seed + 2, *batch.images.shape) * scale)
    denoised, got = port.jvp(config, params, batch.noisy, batch.sigma, batch.labels, tangent, **batch.options)
    exact, _ = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *batch.rest)))
    measure.close(denoised, exact, tolerance.network(config), what="the denoised images", why=NETWORK)
    wanted = oracle.along(config, params, batch, tangent)
    allowed = 4 * tolerance.network(config) + tolerance.difference(config)
    why = "4 x network as a gradient, and tolerance.difference"
    measure.close(got, wanted, allowed, what="the derivative of D", why=why)


def _ask_variants(port: Subject, config: NetworkConfig, seed: int, *, compile: bool) -> None:
    """Gains are at most 1, as after training: half precision amplifies more."""
    asked = {name: Subject(name, other) for name, other in port.variants().items()}
    asked = {name: other for name, other in asked.items() if (other.compiles and not port.compiles) == compile}
    if not asked:
        raise NotImplementedByPort(f"not implemented: a variant{' that compiles, of a port that does not' * compile}")
    params = draw.random_parameters(config, seed, max_gain=1.0)
    batch = draw.random_batch(config, seed)
    wanted = reference.denoise(config, *wide((params, batch.noisy, batch.sigma, *batch.rest)))
    for name, other in asked.items():
        dtype = name if name in ("bfloat16", "float16", "float64") else "float32"
        allowed = tolerance.network(config, "float32" if dtype == "float64" else dtype)
        got = other.denoise(config, params, batch.noisy, batch.sigma, *batch.rest)
        why = f"eps of {dtype} (4 layers + 8)"
        measure.close(got[0], wanted[0], allowed, what=f"the denoised images of the variant {name}", why=why)


def variants(port: Subject, config: NetworkConfig, seed: int) -> None:
    """The port in other precisions, on other devices, and uncompiled if the port compiles."""
    _ask_variants(port, config, seed, compile=False)


def compiled(port: Subject, config: NetworkConfig, seed: int) -> None:
    """Variants that compile, of a port that does not; each network takes them long."""
    _ask_variants(port, config, seed, compile=True)


# ---- sampling


def sample(
    port: Subject, config: NetworkConfig, seed: int, n: int, sigma_min: float, sigma_max: float, rho: float
) -> None:
    params, batch = draw.random_parameters(config, seed, max_gain=1.0), draw.random_batch(config, seed)
    options: Any = {"num_steps": n, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    got = port.sample(config, params, batch.unit_noise, batch.labels, **batch.options, **options)
    wanted = sampler.sample(oracle.denoiser(config, params, *batch.rest), wide(batch.unit_noise), **options)
    allowed = tolerance.sampled(config, evaluations=2 * n, gain=1.0)
    measure.close(got, wanted, allowed, what="the sampled images", why=SAMPLED)


def guide_of(config: NetworkConfig, other: NetworkConfig, same: bool) -> NetworkConfig:
    """The config of a guide that fits ``config``: the same, or a smaller one taken from ``other``."""
    if same:
        return config
    return replace(
        other,
        img_resolution=config.img_resolution,
        img_channels=config.img_channels,
        cond_channels=config.cond_channels if other.cond_channels else 0,
        label_dim=0,
        channel_mult=(1,),
        attn_resolutions=(),
        channels_per_head=other.model_channels,
    )


def guided_sample(
    port: Subject, config: NetworkConfig, other: NetworkConfig, seed: int, w: float, churn: float, same: bool
) -> None:
    """The guide has another config, or the same; then only its parameters are given."""
    other = guide_of(config, other, same)
    params = draw.random_parameters(config, seed, max_gain=0.5)
    guide = draw.random_parameters(other, seed + 1, max_gain=0.5)
    batch, n = draw.random_batch(config, seed), 4  # two levels are churned, so the order of the noise matters
    noise = batch.unit_noise
    fresh = draw.frozen(np.stack([draw.normal(seed + i, *noise.shape) for i in range(n)]))
    options: Any = {"num_steps": n, "sigma_max": 20.0, "S_churn": churn, "S_min": 0.01, "S_max": 10.0, "S_noise": 1.01}
    given: Any = {"guide": guide if same else (other, guide), "guidance": w, "churn_noise": fresh}
    got = port.sample(config, params, noise, batch.labels, **given, **batch.options, **options)
    net, away = (oracle.denoiser(c, p, *batch.rest) for c, p in ((config, params), (other, guide)))
    wanted = sampler.sample(sampler.guided(net, away, guidance=w), wide(noise), churn_noise=wide(fresh), **options)
    allowed = max(tolerance.sampled(c, evaluations=4 * n, gain=0.5, guidance=w) for c in (config, other))
    measure.close(got, wanted, allowed, what="the guided images", why=f"{SAMPLED}, gain x (|w| + |w - 1|)")


def sample_batch_independence(port: Subject, config: NetworkConfig, seed: int) -> None:
    params, batch = draw.random_parameters(config, seed, max_gain=1.0), draw.random_batch(config, seed, size=3)
    together = port.sample(config, params, batch.unit_noise, batch.labels, num_steps=3, **batch.options)
    image = batch.part(slice(1, 2))
    alone = port.sample(config, params, image.unit_noise, image.labels, num_steps=3, **image.options)
    allowed = tolerance.sampled(config, evaluations=5, gain=1.0)
    measure.close(alone, together[1:2], allowed, what="image 1 of 3 by itself", why=SAMPLED)


def seeds(port: Subject, config: NetworkConfig, first: int) -> None:
    """8-bit pixels of seeded noise and labels are at most one level from the oracle's, so those of any two ports differ
    by at most two."""
    params = draw.random_parameters(config, 0, max_gain=1.0)
    chosen, shape = range(first, first + 2), (config.img_channels, *config.image_size)
    noise = draw.frozen(streams.noise(chosen, shape))
    labels = None
    if config.label_dim:
        labels = draw.frozen(one_hot(streams.labels(chosen, config.label_dim), config.label_dim))
    batch = draw.random_batch(config, first)._replace(labels=labels)
    got = port.sample(config, params, noise, labels, num_steps=4, **batch.options)
    wanted = sampler.sample(oracle.denoiser(config, params, *batch.rest), wide(noise), num_steps=4)
    levels = [np.rint(np.clip(np.asarray(x, np.float64) * 127.5 + 128, 0, 255)) for x in (got, wanted)]
    off = float(np.abs(levels[0] - levels[1]).max())
    measure.within(off, 1.0, what="the pictures of two seeds", why="one of 256 levels, for rounding to the other side")


RANDOM, LABELLED, BACKWARD, COMPILED = (
    {"config": configs, "seed": draw.seeds}
    for configs in (
        draw.configs(),
        draw.configs(labels=True),
        draw.configs(narrowest=draw.BACKWARD),
        st.just(draw.FEW_CONFIGS[0]),
    )
)
REFERENCE = "edm2_core.reference on float64 NumPy"
SAMPLER = "edm2_core.sampler over edm2_core.reference, in float64"
SCHEDULE = {
    "n": st.integers(1, 4), "sigma_min": st.floats(0.002, 0.1), "sigma_max": st.floats(5, 80), "rho": st.floats(3, 9),
}  # fmt: skip
GUIDE = {"other": draw.configs(), "w": st.floats(0, 2), "churn": st.floats(0, 40), "same": st.booleans()}

CASES = (
    PortCase(
        "denoise", ("API-3", "NET-5", "NET-6", "NET-10", "NET-11"), RANDOM, denoise, REFERENCE, NETWORK, "denoise",
    ),
    PortCase("network-answer", ("NET-5",), RANDOM, network_answer, REFERENCE, NETWORK, "denoise", cost=2),
    PortCase("fresh-network", ("NET-4", "NET-5"), RANDOM, fresh_network, REFERENCE, NETWORK, "denoise", cost=4),
    PortCase(
        "batch-independence", ("NET-7",), RANDOM, batch_independence, "the port, on each image alone", NETWORK,
        "denoise", cost=6,
    ),
    PortCase("dropped-labels", ("LOSS-4", "NET-8"), LABELLED, dropped_labels, REFERENCE, NETWORK, "denoise", cost=4),
    PortCase("no-label", ("NET-8",), LABELLED, no_label, f"{REFERENCE} of zeros", NETWORK, "denoise", cost=4),
    PortCase(
        "jvp", ("NET-5", "STEP-1"), BACKWARD, jvp, f"central differences of {REFERENCE}", "4 x network",
        "jvp", cost=4,
    ),
    PortCase(
        "variants", ("API-1", "NET-5"), RANDOM, variants, REFERENCE, "eps of the precision (4 layers + 8)",
        "variants", cost=8,
    ),
    PortCase(
        "compiled", ("API-1", "NET-5"), COMPILED, compiled, REFERENCE, "eps of the precision (4 layers + 8)",
        "variants", cost=25,
    ),
    PortCase("sample", ("SAMPLE-1", "SAMPLE-2"), RANDOM | SCHEDULE, sample, SAMPLER, SAMPLED, "sample", cost=4),
    PortCase(
        "guided-sample", ("SAMPLE-4", "SAMPLE-5", "NET-11"), RANDOM | GUIDE, guided_sample, SAMPLER, SAMPLED, "sample",
        cost=4,
    ),
    PortCase(
        "sample-batch-independence", ("NET-7", "SAMPLE-2"), RANDOM, sample_batch_independence,
        "the port, on one image alone", SAMPLED, "sample", cost=10,
    ),
    PortCase(
        "seeds", ("SAMPLE-6",), {"config": draw.configs(), "first": st.integers(0, 10**6)}, seeds, SAMPLER,
        "one of 256 levels", "sample", cost=10,
    ),
)  # fmt: skip
