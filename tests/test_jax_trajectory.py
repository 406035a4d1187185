"""Sampling in JAX as one compiled program: the images of the loop that all ports share, by a program of one size."""

import numpy as np
import pytest

from backends import ports
from conformance import strategies as draw
from conformance import tolerance
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

from backends.jax import trajectory  # noqa: E402
from backends.jax.denoiser import Network, SamplingDenoiser, denoiser  # noqa: E402
from backends.jax.port import PORT  # noqa: E402

CONFIG = NetworkConfig(
    img_resolution=4, img_channels=2, label_dim=3, cond_channels=1, model_channels=6, channel_mult=(1,), num_blocks=1,
    attn_resolutions=(), channels_per_head=6, logvar_channels=5,
)  # fmt: skip
CHURN = {"S_churn": 8.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 1.1}
OPTIONS = {
    "heun": {},
    "euler, levels of one's own": {"method": "euler", "sigmas": (9.0, 2.0, 0.4, 0.1)},
    "churn": CHURN,
    "guided by itself": {"guidance": 1.7},
    "guided by itself in one call, within an interval": {
        "guidance": 1.7, "guide_interval": (0.1, 5.0), "joint": True, **CHURN,
    },
    "guided by another within an interval": {"guidance": 1.7, "guide_interval": (0.1, 5.0), "guide": True},
    "guided where no level is": {"guidance": 1.7, "guide_interval": (100.0, 200.0), "guide": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    return [PORT.denoiser(CONFIG, draw.random_parameters(CONFIG, seed)) for seed in (0, 1)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_program_gives_the_images_of_the_loop(networks, options):
    noise, condition, *churn = (jax.numpy.asarray(draw.normal(i, 3, 4, 4, 2 - (i == 1))) for i in range(8))
    arguments = {"condition": condition, "num_steps": 5, "churn_noise": churn, **options}
    arguments |= {"guide": networks[1]} if "guide" in options else {}
    given = networks[0], noise, jax.numpy.eye(3)
    with jax.default_matmul_precision("highest"):
        wanted = ports.sample(*given, **arguments)
        got = trajectory.sample(*given, **arguments)
    assert got.dtype == wanted.dtype
    assert tolerance.relative(got, wanted) < tolerance.sampled(CONFIG, evaluations=9, gain=1.0, guidance=1.7)


def test_the_program_does_not_grow_with_the_steps_and_holds_the_network_once():
    """A network that counts how often it is traced; the jaxpr of 4 and of 40 steps."""
    traced = []

    def backbone(params, x, c_noise, labels, *, key):
        traced.append(1)
        return params * x

    def program(steps):
        net = SamplingDenoiser(Network(denoiser(backbone), jax.numpy.float32(0.5)))
        made = jax.make_jaxpr(lambda noise: trajectory.sample(net, noise, num_steps=steps))(jax.numpy.ones((2, 3)))
        return sum(text.count(" = ") for text in str(made).splitlines())

    assert program(4) == program(40)
    assert len(traced) == 2  # once in each program


def test_a_sampler_of_the_port_runs_one_program_and_takes_any_number_of_steps(networks, monkeypatch):
    """The denoiser itself is never called from outside of it, but with a callback."""
    eager = []
    whole = SamplingDenoiser.__call__

    def watched(self, x, *rest):
        eager.append(not isinstance(x, jax.core.Tracer))
        return whole(self, x, *rest)

    monkeypatch.setattr(SamplingDenoiser, "__call__", watched)
    params, noise, condition = draw.random_parameters(CONFIG, 0), draw.normal(0, 3, 2, 4, 4), draw.normal(1, 3, 1, 4, 4)
    sampler = PORT.sampler(CONFIG, params)
    images = sampler(noise, np.eye(3, dtype=np.float32), condition=condition, num_steps=3)
    assert not any(eager)
    seen = []
    options = {"num_steps": 3, "callback": seen.append}
    watched_images = sampler(noise, np.eye(3, dtype=np.float32), condition=condition, **options)
    assert sum(eager) == 5
    assert len(seen) == 3
    assert tolerance.relative(images, watched_images) < tolerance.sampled(CONFIG, evaluations=5, gain=1.0)


def test_noise_in_bfloat16_gives_images_in_bfloat16(networks):
    noise, condition = jax.numpy.asarray(draw.normal(0, 3, 4, 4, 2)), jax.numpy.zeros((3, 4, 4, 1))
    wanted = trajectory.sample(networks[0], noise, jax.numpy.eye(3), condition=condition, num_steps=3)
    narrow = noise.astype("bfloat16")
    got = trajectory.sample(networks[0], narrow, jax.numpy.eye(3), condition=condition, num_steps=3)
    assert got.dtype == "bfloat16"
    assert tolerance.relative(got.astype("float32"), wanted) < 0.05


def test_what_does_not_fit_is_refused_before_anything_is_compiled(networks):
    noise, condition = jax.numpy.ones((3, 4, 4, 2)), jax.numpy.zeros((3, 4, 4, 1))
    labels = jax.numpy.eye(3)
    with pytest.raises(InputError, match="must be sampled with a condition for each of 3 images, got None"):
        trajectory.sample(networks[0], noise, labels)
    with pytest.raises(InputError, match="needs one array of churn_noise for each step with churn"):
        trajectory.sample(networks[0], noise, labels, condition=condition, num_steps=4, churn_noise=[noise], **CHURN)
    with pytest.raises(InputError, match="guidance without a guide needs labels, got None"):
        trajectory.sample(networks[0], noise, condition=condition, guidance=2.0)
