"""Ports with one fault each, and the case that must catch it: they show that the suite can fail.

Each is the port of :mod:`.training_port` with one function, or one line of the training step, replaced.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod, sqrt
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conformance import measure, oracle
from conformance.ports import Subject
from conformance.strategies import Batch
from conformance.training_port import Fault, Step, TrainingPort
from edm2_core import ema, loss, mp, precond, reference, sampler
from edm2_core.arrays import namespace
from edm2_core.ema import Length
from edm2_core.state import State

# ---- wrong functions


def _silu(x: Any) -> Any:
    return mp.mp_silu(x) * (0.596 / 0.6)


def _cat_swapped(a: Any, b: Any, *, axis: int, t: float) -> Any:
    return mp.mp_cat(a, b, axis=axis, t=1 - t)


def _cat_plain(a: Any, b: Any, *, axis: int, t: float) -> Any:
    scale = sqrt((1 - t) ** 2 + t**2)
    return namespace(a).concat([a * ((1 - t) / scale), b * (t / scale)], axis=axis)


def _sum_plain(a: Any, b: Any, *, t: float) -> Any:
    return (1 - t) * a + t * b


def _normalize_inside(x: Any, *, axis: Any = None, eps: float = 1e-4) -> Any:
    axes = tuple(range(1, x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    xp = namespace(x)
    return x / xp.sqrt(xp.sum(x * x, axis=axes, keepdims=True) / prod(x.shape[i] for i in axes) + eps)


def _normalize_unit(x: Any, *, axis: Any = None, eps: float = 1e-4) -> Any:
    return x if axis == 1 else mp.normalize(x, axis=axis, eps=eps)


def _weight_eps(w: Any, *, gain: Any = 1.0) -> Any:
    xp, axes = namespace(w), tuple(range(1, w.ndim))
    return w / (1e-4 + xp.sqrt(xp.sum(w * w, axis=axes, keepdims=True))) * gain


def _conv_transposed(x: Any, w: Any, *, gain: Any = 1.0) -> Any:
    return _CONV(x, namespace(w).permute_dims(w, (0, 1, 3, 2)), gain=gain)


def _conv_half(x: Any, w: Any, *, gain: Any = 1.0) -> Any:
    if not isinstance(x, np.ndarray):
        return _CONV(x, w, gain=gain)
    return np.asarray(_CONV(np.asarray(x, np.float16), np.asarray(w, np.float16), gain=1.0), np.float64) * gain


def _heads(order: str) -> Callable[..., Any]:
    """Attention whose qkv channels are read in another order than [heads, channels per head, 3]."""

    def wrong(config: Any, block: Any, params: Any, x: Any) -> Any:
        name, heads = f"{block.name}.attn_qkv.weight", block.heads
        w = params[name]
        xp, width = namespace(w), w.shape[0] // 3 // heads
        if order == "swapped":  # k, q, v
            parts = xp.reshape(w, (heads, width, 3, *w.shape[1:]))
            parts = xp.concat([parts[:, :, 1:2], parts[:, :, 0:1], parts[:, :, 2:]], axis=2)
        else:  # stored as [3, heads, channels per head]
            parts = xp.permute_dims(xp.reshape(w, (3, heads, width, -1)), (1, 2, 0, 3))
        return _ATTENTION(config, block, {**params, name: xp.reshape(parts, w.shape)}, x)

    return wrong


def _attention_unscaled(config: Any, block: Any, params: Any, x: Any) -> Any:
    with mock.patch.object(reference, "sqrt", return_value=1.0):
        return _ATTENTION(config, block, params, x)


def _embedding_unscaled(config: Any, params: Any, c_noise: Any, labels: Any) -> Any:
    return _EMBEDDING(config, params, c_noise, None if labels is None else labels / sqrt(config.label_dim))


def _block_unclipped(config: Any, block: Any, params: Any, x: Any, emb: Any) -> Any:
    return _BLOCK(replace(config, clip_act=None), block, params, x, emb)


def _block_balance(config: Any, block: Any, params: Any, x: Any, emb: Any) -> Any:
    return _BLOCK(replace(config, res_balance=1 - config.res_balance), block, params, x, emb)


def _resample_weak(x: Any, *, mode: Any, filter: Any) -> Any:
    return mp.resample(x, mode=mode, filter=filter) * (0.25 if mode == "up" else 1)


def _resample_turned(x: Any, *, mode: Any, filter: Any) -> Any:
    return mp.resample(x, mode=mode, filter=tuple(filter)[::-1])


def _precondition(**wrong: Callable[[Any], Any]) -> Callable[..., Any]:
    def changed(sigma: Any, *, sigma_data: float) -> Any:
        c = _PRECONDITION(sigma, sigma_data=sigma_data)
        return c._replace(**{name: how(c) for name, how in wrong.items()})

    return changed


def _condition_unscaled(scaled: Any, condition: Any, *, sigma_data: float) -> Any:
    return _JOIN(scaled, condition, sigma_data=1.0)


def _padded_after(x: Any, padding: Any) -> Any:
    """Around images, all rows below and all columns to the right; around the input of a kernel as it must be."""
    of_kernel = len({*padding[0], *padding[1]}) == 1
    (above, below), (left, right) = padding
    return _PADDED(x, padding if of_kernel else ((0, above + below), (0, left + right)))


def _loss_without_u(denoised: Any, images: Any, sigma: Any, logvar: Any, *, sigma_data: float) -> Any:
    return _LOSS(denoised, images, sigma, logvar, sigma_data=sigma_data) - logvar


def _euler(*arguments: Any, **options: Any) -> Any:
    return _SAMPLE(*arguments, **options | {"method": "euler"})


def _guided(net: Any, guide: Any, *, guidance: float) -> Any:
    return _GUIDED(guide, net, guidance=guidance)


def _same_churn(*arguments: Any, churn_noise: Any = None, **options: Any) -> Any:
    fresh = None if churn_noise is None else list(churn_noise)
    return _SAMPLE(*arguments, churn_noise=fresh and [fresh[0]] * len(fresh), **options)


def _no_s_noise(*arguments: Any, **options: Any) -> Any:
    return _SAMPLE(*arguments, **options | {"S_noise": 1.0})


def _levels(n: int, **options: Any) -> Any:
    low, high = options["sigma_min"], options["sigma_max"]
    return [float(s) for s in np.geomspace(high, low, n)] + [0.0]


_CONV, _ATTENTION, _EMBEDDING, _BLOCK = reference.conv, reference.attention, reference.embedding, reference.run_block
_PADDED, _JOIN = reference.padded, precond.join_condition
_PRECONDITION, _LOSS, _SAMPLE, _GUIDED = precond.precondition, loss.loss, sampler.sample, sampler.guided


# ---- wrong lines of the step


def _mean_gradients(config: Any, weights: Any, batch: Batch) -> Any:
    values, gradients = oracle.torch_gradients(config, weights, batch)
    return values, {name: g / batch.images[0].size for name, g in gradients.items()}


def _stuck_gradients(config: Any, weights: Any, batch: Batch) -> Any:
    """With a component along the weight, as if the norm were a constant."""
    values, gradients = oracle.torch_gradients(config, weights, batch)
    return values, {
        n: g + 0.1 * np.linalg.norm(g) * weights[n] / max(float(np.linalg.norm(weights[n])), 1e-9) if g.ndim > 1 else g
        for n, g in gradients.items()
    }


def _half_gradients(config: Any, weights: Any, batch: Batch) -> Any:
    values, gradients = oracle.torch_gradients(config, weights, batch)
    return values, {name: g.astype(np.float16).astype(np.float64) for name, g in gradients.items()}


def _uncorrected(weight: Any, first: Any, second: Any, *, lr: float, betas: Any, step: int) -> Any:
    return weight - lr * first / (np.sqrt(second) + 1e-8)


def _gamma_off(length: Length, *, nimg: int, batch: int, step: int) -> float:
    return (1 - batch / nimg) ** ema.sigma_rel_to_gamma(length.value) if batch < nimg else 0.0


def _beta_late(length: Length, *, nimg: int, batch: int, step: int) -> float:
    before = nimg - batch
    return max(1 - batch / before, 0.0) ** (ema.sigma_rel_to_gamma(length.value) + 1) if before else 0.0


def _beta_steps(length: Length, *, nimg: int, batch: int, step: int) -> float:
    return length.beta(t_next=step, t_delta=1)


def _first_kept(length: Length, *, nimg: int, batch: int, step: int) -> float:
    return length.beta(t_next=nimg, t_delta=batch) or 0.5


def _unforced(config: Any, weights: Any) -> Any:
    return weights


def _without_moments(state: State) -> State:
    zeros = {name: np.zeros_like(array) for name, array in state.moments1.items()}
    return replace(state, moments1=zeros)


def _averages_from_weights(state: State) -> State:
    return replace(state, averages=dict.fromkeys(state.averages, state.params))


def _swapped_betas(first: Any, second: Any, gradient: Any, betas: tuple[float, float]) -> Any:
    return Step.moments(first, second, gradient, betas[::-1])


FAULTS = (
    Fault("silu-0.6", "mp_silu divides by 0.6", "denoise", {"reference.mp_silu": _silu}),
    Fault("cat-swapped", "mp_cat has t and 1 - t swapped", "denoise", {"reference.mp_cat": _cat_swapped}),
    Fault("cat-plain", "mp_cat ignores how many channels each side has", "denoise", {"reference.mp_cat": _cat_plain}),
    Fault("sum-plain", "mp_sum does not divide by the blend's norm", "denoise", {"reference.mp_sum": _sum_plain}),
    Fault("eps-inside", "normalize adds eps inside the root", "denoise", {"reference.normalize": _normalize_inside}),
    Fault("eps-outside", "mp_weight adds eps to the norm, not to the rms", "denoise",
          {"reference.mp_weight": _weight_eps}),
    Fault("no-pixel-norm", "encoder blocks skip the pixel norm", "denoise", {"reference.normalize": _normalize_unit}),
    Fault("kernel-transposed", "kernels are transposed", "denoise", {"reference.conv": _conv_transposed}),
    Fault("half-sums", "convolutions sum in float16", "denoise", {"reference.conv": _conv_half}),
    Fault("qk-swapped", "q and k are swapped", "denoise", {"reference.attention": _heads("swapped")}),
    Fault("qkv-order", "qkv is read as [3, heads, channels]", "denoise", {"reference.attention": _heads("outer")}),
    Fault("attention-unscaled", "no division by the root of a head's channels", "denoise",
          {"reference.attention": _attention_unscaled}),
    Fault("label-scale", "labels are not multiplied by sqrt(label_dim)", "denoise",
          {"reference.embedding": _embedding_unscaled}),
    Fault("condition-unscaled", "the condition is not divided by sigma_data", "denoise",
          {"precond.join_condition": _condition_unscaled}),
    Fault("padded-after", "padding is below and to the right only", "denoise", {"reference.padded": _padded_after}),
    Fault("no-clip", "activations are not clipped", "denoise", {"reference.run_block": _block_unclipped}),
    Fault("residual-reversed", "the residual's balance is reversed", "denoise",
          {"reference.run_block": _block_balance}),
    Fault("up-quarter", "upsampling lacks the factor 4", "denoise", {"reference.resample": _resample_weak}),
    Fault("filter-turned", "the resampling filter is turned around", "denoise",
          {"reference.resample": _resample_turned}),
    Fault("noise-half", "c_noise is ln(sigma) / 2", "fresh-network",
          {"precond.precondition": _precondition(c_noise=lambda c: 2 * c.c_noise)}),
    Fault("skip-root", "c_skip is the square root of the right value", "fresh-network",
          {"precond.precondition": _precondition(c_skip=lambda c: c.c_skip**0.5)}),
    Fault("out-scale", "c_out is off by 0.1 %", "network-answer",
          {"precond.precondition": _precondition(c_out=lambda c: c.c_out * 1.001)}),
    Fault("loss-without-u", "the loss lacks its second u", "loss", {"loss.loss": _loss_without_u}),
    Fault("mean-gradients", "gradients are of the mean loss, not of the sum over N", "gradients", {},
          {"gradients": _mean_gradients}),
    Fault("gradient-along-weight", "the gradient ignores the normalization", "gradient-along-directions", {},
          {"gradients": _stuck_gradients}),
    Fault("half-gradients", "gradients are rounded to float16", "gradients", {}, {"gradients": _half_gradients}),
    Fault("adam-uncorrected", "Adam lacks its bias correction", "training", {}, {"adam": _uncorrected}),
    Fault("betas-swapped", "Adam's betas are swapped", "training", {}, {"moments": _swapped_betas}),
    Fault("never-forced", "weights are never forced onto their spheres", "first-step", {}, {"forced": _unforced}),
    Fault("forced-after", "weights are forced after the averages instead of before the step", "first-step", {},
          {"forced": _unforced, "kept": Step.forced}),
    Fault("normalized-averages", "averages take the normalized weights", "first-step", {}, {"averaged": Step.forced}),
    Fault("gamma-off-by-one", "beta has the exponent gamma, not gamma + 1", "training", {}, {"keep": _gamma_off}),
    Fault("beta-late", "beta divides by t, not t + delta", "training", {}, {"keep": _beta_late}),
    Fault("clock-in-steps", "averages count steps, not images", "training", {}, {"keep": _beta_steps}),
    Fault("first-not-copied", "the first update keeps half of the initial average", "first-step", {},
          {"keep": _first_kept}),
    Fault("moments-lost", "resuming forgets Adam's first moment", "resuming", {}, {"resumed": _without_moments}),
    Fault("averages-lost", "resuming starts the averages from the weights", "state-file", {},
          {"resumed": _averages_from_weights}),
    Fault("euler", "Heun steps lack the second evaluation", "sample", {"sampler.sample": _euler}),
    Fault("geometric", "noise levels are geometric, not of power rho", "sample", {"sampler.noise_levels": _levels}),
    Fault("guidance-reversed", "net + w (guide - net)", "guided-sample", {"sampler.guided": _guided}),
    Fault("churn-repeated", "churn adds the same noise each time", "guided-sample", {"sampler.sample": _same_churn}),
    Fault("no-s-noise", "S_noise is ignored", "guided-sample", {"sampler.sample": _no_s_noise}),
)  # fmt: skip


def caught(fault: Fault | None, case_name: str, *, examples: int = 60) -> measure.Disagreement | None:
    """The disagreement that the case finds with a port of that fault, or None if the port passes."""
    from conformance.cases import PORT_CASES

    case = next(case for case in PORT_CASES if case.name == case_name)
    subject = Subject(fault.name if fault else "right", TrainingPort(fault))

    @settings(max_examples=examples, phases=[Phase.generate], derandomize=True, deadline=None, database=None)
    @given(st.fixed_dictionaries(dict(case.draws)))
    def ask(example: Any) -> None:
        case.run(subject, example)

    try:
        with measure.recording(measure.Record()):
            ask()
    except measure.Disagreement as error:
        return error
    return None


def page() -> str:
    """docs/wrong_ports.md: every fault, the case that caught it, and its message."""
    lines = [
        "# Wrong ports", "",
        "Ports with one fault each (`conformance/wrong_ports.py`). The suite must catch each one with the case named",
        "here; `conformance/test_wrong_ports.py` runs them all.",
        "Made by `python -m conformance --wrong-ports docs/wrong_ports.md`.",
        "", "| port | fault | caught by | message |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for fault in FAULTS:
        said = caught(fault, fault.caught_by)
        lines.append(f"| {fault.name} | {fault.says} | `{fault.caught_by}` | {said.summary if said else 'NOTHING'} |")
    return "\n".join(lines) + "\n"
