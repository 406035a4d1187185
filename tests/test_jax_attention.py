"""Attention of the JAX port: by products, and by cuDNN where that agrees with them."""

from types import SimpleNamespace

import numpy as np
import pytest

from conformance import strategies as draw
from conformance import tolerance
from edm2_core.network import NetworkConfig

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("optax", reason="optax is not installed")

import jax.numpy as jnp  # noqa: E402

from backends.jax import attention, weights  # noqa: E402
from backends.jax.network import network_denoiser  # noqa: E402

SHAPE = (16, 2, 8)  # tokens, heads, D


def qkv(dtype="float32", images=2):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(images, *SHAPE)), dtype) for _ in range(3)]


def narrow(q, k, v):
    """What a fused kernel computes, on any device."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


@pytest.fixture
def untried():
    attention.cudnn_agrees.cache_clear()
    yield
    attention.cudnn_agrees.cache_clear()


def test_products_are_the_softmax_of_scaled_scores():
    q, k, v = (np.asarray(x, np.float64) for x in qkv())
    scores = np.exp(np.einsum("nqhc,nkhc->nhqk", q, k) / np.sqrt(SHAPE[-1]))
    wanted = np.einsum("nhqk,nkhc->nqhc", scores / scores.sum(axis=-1, keepdims=True), v)
    assert tolerance.relative(attention.by_products(*qkv()), wanted) < 1e-6


def test_without_cudnn_it_is_products(untried):
    for dtype in ("float32", "bfloat16"):
        assert np.array_equal(attention.fused(*qkv(dtype)), attention.by_products(*qkv(dtype)))
    assert attention.fastest(jax.devices("cpu")[0]) is attention.by_products
    assert attention.fastest(SimpleNamespace(platform="gpu")) is attention.fused


def refused(q, k, v):
    raise NotImplementedError("Unsupported sequence length")


@jax.custom_vjp
def backward_off(q, k, v):
    return narrow(q, k, v)


backward_off.defvjp(
    lambda q, k, v: (narrow(q, k, v), (q, k, v)),
    lambda given, g: tuple(1.1 * x for x in jax.vjp(narrow, *given)[1](g)),
)


@pytest.mark.parametrize(
    ("kernel", "agrees"),
    [
        (narrow, True),
        (refused, False),
        (lambda q, k, v: narrow(1.1 * q, k, v), False),
        (lambda q, k, v: jnp.full_like(q, jnp.nan), False),
        (backward_off, False),
    ],
    ids=["as it should", "refused", "other scale", "not a number", "other gradients"],
)
def test_cudnn_is_used_where_it_agrees(kernel, agrees, untried, monkeypatch):
    monkeypatch.setattr(attention, "_by_cudnn", kernel)
    traced = jax.jit(lambda *inputs: attention.fused(*inputs))(*qkv("bfloat16"))  # tried within a trace
    assert attention.cudnn_agrees(SHAPE, "bfloat16") == agrees
    assert not attention.cudnn_agrees(SHAPE, "float32")
    wanted = (kernel if agrees else attention.by_products)(*qkv("bfloat16"))
    assert tolerance.relative(traced, wanted) <= tolerance.eps("bfloat16")


def test_the_program_for_a_gpu_calls_cudnn_forward_and_backward(monkeypatch):
    """Lowered, not run; and no array has the size of the weights of attention."""
    for name, answer in (("check_cudnn_version", 91300), ("check_compute_capability", True),
                         ("is_cuda_compute_capability_equal", False)):  # fmt: skip
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(attention, "cudnn_agrees", lambda shape, dtype: True)

    def scalar(*inputs):
        return attention.fused(*inputs).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(scalar, argnums=(0, 1, 2))).trace(*qkv("bfloat16"))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in program
    assert "__cudnn$fmhaSoftmaxBackward(" in program
    assert f"{SHAPE[0]}x{SHAPE[0]}x" not in program


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_network_attends_by_what_it_is_given(recomputes):
    config = NetworkConfig(
        img_resolution=4, img_channels=2, label_dim=3, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(4,), channels_per_head=8,
    )  # fmt: skip
    params, batch = draw.random_parameters(config, 1), draw.random_batch(config, 3, size=2)
    seen = []

    def counted(q, k, v):
        seen.append(q.shape)
        return narrow(q, k, v)

    def gradients(attend):
        denoise = network_denoiser(config, "float32", recomputes, attend)
        inputs = weights.to_nhwc(batch.noisy), weights.to_nhwc(batch.sigma), batch.labels
        loaded = weights.load(config, params)
        return jax.jit(jax.grad(lambda p: jnp.square(denoise(p, *inputs)[0]).sum()))(loaded)

    got, wanted = gradients(counted), gradients(attention.by_products)
    assert len(seen) >= len([name for name in params if name.endswith("attn_qkv.weight")]) > 0
    assert tolerance.relative_all(got, wanted, 1.0)[0] < 1e-4
