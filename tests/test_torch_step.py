"""The PyTorch step beyond what the conformance suite asks of every port: precision, accumulation, faults, wrappers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from backends.pipeline.data import batches as data
from backends.pipeline.runs.config import DataSummary, TrainConfig
from backends.pipeline.runs.team import PeerLost
from backends.ports import Machine
from backends.torch import step, working_weights
from backends.torch.denoiser import Denoiser
from backends.torch.dropout import Dropout, dropping
from backends.torch.network import Layer, Network
from backends.torch.port import PORT
from backends.torch.step import Batch, Learner, all_fit, batch_loss, force_weight_norm, zero_nonfinite
from backends.torch.trainer import TorchTrainer
from backends.torch.weights import build, dump, tensors
from conformance import oracle, tolerance
from conformance import strategies as draw
from edm2_core.codec import Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig, initialize, plan
from edm2_core.presets import Hyperparameters
from edm2_core.state import State

CONFIG = NetworkConfig(
    img_resolution=8,
    img_channels=1,
    label_dim=3,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=8,
    logvar_channels=8,
)


def make_network(dtype: torch.dtype = torch.float32, **changes: object) -> Network:
    config = replace(CONFIG, **changes)
    params = initialize(config, seed=0)
    gains = {name for name, p in plan(config).parameters.items() if p.init == "zeros"}
    return build(config, {n: np.float32(0.5) if n in gains else a for n, a in params.items()}, dtype=dtype)


def make_batch(size: int = 12, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn((size, 1, 8, 8), generator=draw) for _ in range(2))
    sigma = torch.randn((size, 1, 1, 1), generator=draw).exp()
    return Batch(images * 0.5, noise, sigma, torch.eye(3)[torch.arange(size) % 3])


def train(network: torch.nn.Module, steps: int = 3, **options: object) -> Learner:
    learner = Learner(network, **options)  # type: ignore[arg-type]
    for i in range(steps):
        learner.step(make_batch(seed=i), lr=0.01)
    return learner


def distance(a: Learner, b: Learner) -> float:
    """Largest relative Frobenius distance of a weight, in units of how far training moved it."""
    start = dump(tensors(make_network()))
    x, y = a.state().params, b.state().params
    return max(float(np.linalg.norm(x[n] - y[n]) / np.linalg.norm(x[n] - start[n])) for n in a.weights)


def test_accumulating_gradients_is_one_large_batch() -> None:
    assert distance(train(make_network()), train(make_network(), microbatch=5)) < 1e-3  # Adam divides by small roots


def test_loss_scaling_changes_nothing_in_float32() -> None:
    assert distance(train(make_network()), train(make_network(), loss_scaling=1024.0)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_the_loss_and_gradients_of_float32(dtype: torch.dtype) -> None:
    results = []
    for kind in (torch.float32, dtype):
        network = make_network(kind)
        loss = batch_loss(network, make_batch())
        (loss.sum() / 12).backward()
        assert loss.dtype == torch.float32
        results.append(
            (loss.mean().item(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        )
    (full, full_gradient), (half, half_gradient) = results
    eps = torch.finfo(dtype).eps
    assert half == pytest.approx(full, rel=20 * eps)
    # about thirty roundings on the longest path, each of relative size eps, adding as a random walk and some to spare
    assert (half_gradient - full_gradient).norm() < 20 * eps * full_gradient.norm()


def test_weights_and_averages_stay_float32_in_half_precision() -> None:
    learner = train(make_network(torch.bfloat16))
    assert {w.dtype for w in learner.weights.values()} == {torch.float32}
    assert {a.dtype for average in learner.ema.averages.values() for a in average.values()} == {torch.float32}


def test_nonfinite_gradients_are_zeroed_and_counted() -> None:
    gradients = [torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor(-float("inf")), torch.ones(2, 2)]
    assert sum(int(zero_nonfinite(gradient).sum()) for gradient in gradients) == 3
    assert gradients[0].tolist() == [1, 0, 0]
    assert gradients[1].item() == 0
    assert gradients[2].sum() == 4


def test_gradients_pass_unread_only_where_none_would_be_zeroed() -> None:
    """Whatever their number: the square of the largest that stays is near float32's limit."""
    fits = float(np.nextafter(np.float32(2.0**63), np.float32(0)))
    for values in ([fits], [fits] * 1000, [2.0**63], [-(2.0**63), 1.0], [float("inf")], [float("nan"), 1.0]):
        gradients = [torch.ones(3), torch.tensor(values)]
        passes = all_fit(gradients)
        assert not (passes and sum(int(zero_nonfinite(gradient).sum()) for gradient in gradients))
    assert all_fit([torch.zeros(3), torch.full((1000,), 1e15)])


@pytest.mark.parametrize("value", [float("nan"), 1e16])  # the second's gradients are finite, and their squares are not
def test_a_step_survives_a_poisoned_batch(value: float) -> None:
    learner = Learner(make_network())
    batch = make_batch()
    batch.images[3] = value
    _, nonfinite = learner.step(batch, lr=0.01)
    assert nonfinite.item() > 0
    assert all(weight.isfinite().all() for weight in learner.weights.values())
    assert all(moment["exp_avg_sq"].isfinite().all() for moment in learner.optimizer.state.values())


@pytest.mark.parametrize("normalized", [True, False])
def test_working_weights_and_their_derivative(normalized: bool) -> None:
    """Beside differentiation in float64 of the layer's own formula; a row of zeros included."""
    stored, gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double().split(3)
    stored[2] = 0
    layer = make_network().unet.enc["8x8_block0"].conv_res0
    layer.weight, layer.normalized = torch.nn.Parameter(stored.clone()), normalized
    scale, working = torch.tensor(layer.scale).double(), torch.empty_like(stored)
    rms = working_weights.compute(stored, working, scale, forced=False, normalized=normalized)
    torch.testing.assert_close(working, layer.effective_weight().detach())
    (wanted,) = torch.autograd.grad(layer.effective_weight(), layer.weight, gradient)
    torch.testing.assert_close(working_weights.derivative(stored, rms, gradient, scale, normalized=normalized), wanted)


def test_layers_use_working_weights_within_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(make_network())
    layers = [layer for layer in learner.network.modules() if isinstance(layer, Layer)]
    within = []
    monkeypatch.setattr(step, "batch_loss", lambda *_: within.extend(layer.working for layer in layers) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.step(make_batch(), lr=0.01)
    assert None not in within
    assert {layer.working for layer in layers} == {None}


def test_frozen_weights_stay() -> None:
    name = "unet.enc.8x8_block0.emb_gain"
    before = tensors(make_network())[name].item()
    after = {frozen: tensors(train(make_network(), frozen=frozen).network)[name].item() for frozen in ((), (name,))}
    assert after[name,] == before != after[()]


def test_forward_writes_nothing() -> None:
    network = make_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    batch = make_batch()
    network(batch.images, batch.sigma, batch.labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_forced_normalization_happens_before_the_gradient() -> None:
    scaled = make_network()
    with torch.no_grad():
        for name, parameter in plan(CONFIG).parameters.items():
            if parameter.normalized:
                tensors(scaled)[name].mul_(3)
    assert distance(train(make_network()), train(scaled)) < 1e-3


def test_forced_weights_have_unit_root_mean_square() -> None:
    network = make_network()
    force_weight_norm(network)
    for name, parameter in plan(CONFIG).parameters.items():
        if parameter.normalized:
            before, after = (
                tensors(n)[name].detach().flatten(1).square().mean(1).sqrt() for n in (make_network(), network)
            )
            torch.testing.assert_close(after, before / (before + 1e-4))


def test_dropout_acts_in_training_only() -> None:
    network, batch = make_network(dropout=0.5), make_batch()
    evaluated = network(batch.images, batch.sigma, batch.labels)[0]
    assert torch.equal(evaluated, network(batch.images, batch.sigma, batch.labels)[0])
    network.train()
    assert not torch.equal(evaluated, network(batch.images, batch.sigma, batch.labels)[0])
    assert torch.equal(make_network()(batch.images, batch.sigma, batch.labels)[0], evaluated)


def test_state_goes_on_exactly() -> None:
    whole = train(make_network(), steps=6)
    half = train(make_network(), steps=3)
    resumed = Learner(make_network())
    resumed.load_state(half.state())
    for i in range(3, 6):
        resumed.step(make_batch(seed=i), lr=0.01)
    check_same(resumed.state(), whole.state())


def check_same(one: State, other: State) -> None:
    assert (one.nimg, one.steps) == (other.nimg, other.steps)
    pairs = [(one.params, other.params), (one.moments1, other.moments1), (one.moments2, other.moments2)]
    for ours, theirs in [*pairs, *((one.averages[length], other.averages[length]) for length in other.averages)]:
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], array) for name, array in theirs.items())


class Mlp(torch.nn.Module):
    """A backbone of points in the plane, with a counter that no average touches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        shift = 0 if labels is None else labels[:, :1]
        return self.layers(torch.cat([x, c_noise[:, None], (c_noise[:, None] + shift).sin()], dim=1))


def points(size: int = 8, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x, noise, sigma = (torch.randn((size, n), generator=draw) for n in (2, 2, 1))
    return Batch(x * 0.5, noise, sigma.exp(), torch.eye(3)[torch.arange(size) % 3])


def test_any_denoiser_trains_and_resumes_exactly() -> None:
    def learner_after(steps: int) -> Learner:
        torch.manual_seed(0)
        learner = Learner(Denoiser(Mlp(), label_dim=3), sigma_rels=(0.1, Length.half_life(20)))
        for i in range(steps):
            learner.step(points(seed=i), lr=0.01)
        return learner

    whole, half = learner_after(6), learner_after(3)
    state = half.state()
    assert (state.nimg, set(state.averages)) == (24, {Length.of(0.1), Length.half_life(20)})
    resumed = Learner(Denoiser(Mlp(), label_dim=3), sigma_rels=(0.1, Length.half_life(20)))
    resumed.load_state(state)
    for i in range(3, 6):
        resumed.step(points(seed=i), lr=0.01)
    check_same(resumed.state(), whole.state())


def test_a_state_of_another_network_is_refused() -> None:
    with pytest.raises(InputError, match=r"backbone\.calls must have shape \(\), got None"):
        Learner(Denoiser(Mlp())).load_state(train(make_network(), steps=1).state())


def test_wrapping_changes_no_name() -> None:
    network = make_network()
    compiled = torch.compile(network)
    assert tensors(compiled).keys() == tensors(network).keys() == plan(CONFIG).parameters.keys()
    assert Learner(compiled).ema.arrays(0.05).keys() == plan(CONFIG).parameters.keys()


def test_forward_mode_derivative_is_the_finite_difference() -> None:
    network, batch = make_network().double(), make_batch(4)
    direction = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, sigma, labels = batch.images.double(), batch.sigma.double(), batch.labels.double()  # type: ignore[union-attr]
    network.dtype = torch.float64
    _, derivative = torch.func.jvp(lambda x: network(x, sigma, labels)[0], (x,), (direction,))
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (network(x + step * direction, sigma, labels)[0] for step in (h, -h))
    assert ((ahead - behind) / (2 * h) - derivative).norm() < 1e-6 * derivative.norm()


def test_config_b_has_forward_derivatives_at_any_size() -> None:
    """Convolutions of two pixels a side answer channels last, of which PyTorch's group norm has none."""
    config = NetworkConfig(
        img_resolution=2, img_channels=1, model_channels=6, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
        channels_per_head=6, channels_per_group=6, ladder="B",
    )  # fmt: skip
    params, batch = draw.random_parameters(config, 0), draw.random_batch(config, 0)
    tangent = draw.normal(2, *batch.images.shape)
    _, along = PORT.jvp(config, params, batch.noisy, batch.sigma, batch.labels, tangent)
    assert tolerance.relative(along, oracle.along(config, params, batch, tangent)) < 4 * tolerance.network(config)


def trainer_of(**changes: object) -> TorchTrainer:
    codec = Codec(stored="float32", mean=(0.0,), scale=(1.0,))
    channels, size = CONFIG.img_channels, CONFIG.image_size
    summary = DataSummary(count=12, shape=(channels, *size), label_dim=CONFIG.label_dim, format=DataFormat(codec=codec))
    hyper = Hyperparameters(batch=12, sigma_rels=(0.05, 0.1))
    config = TrainConfig(network=CONFIG, hyper=hyper, data_summary=summary)
    return TorchTrainer(config, Machine(device="cpu", **changes))  # type: ignore[arg-type]


def test_a_trainer_gives_one_average_and_keeps_the_clock() -> None:
    trainer, batch = trainer_of(), make_batch()
    assert batch.labels is not None
    placed = trainer.place(data.Batch(batch.images.numpy(), batch.labels.numpy()))
    trainer.step(placed, lr=0.01)
    assert trainer.nimg == 12
    average, state = trainer.average(Length.of(0.1)), trainer.state()
    assert average.keys() == trainer.parameters().keys() == plan(CONFIG).parameters.keys()
    assert all(np.array_equal(average[name], array) for name, array in state.averages[Length.of(0.1)].items())
    assert set(trainer.metrics()) == {"loss", "nonfinite"}


def test_exhausted_memory_names_the_batch_to_try() -> None:
    trainer, batch = trainer_of(batch_per_device=6), make_batch()

    def exhausted(module: torch.nn.Module, args: object) -> None:
        torch.empty(1 << 60)  # more than any machine has

    trainer.learner.network.register_forward_pre_hook(exhausted)
    with pytest.raises(InputError, match=r"memory.*--batch-per-device 3"):
        trainer.step(trainer.place(data.Batch(batch.images.numpy())), lr=0.01)
    assert trainer.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not trainer.is_out_of_memory(RuntimeError("shapes differ"))


def test_a_state_after_an_error_is_that_of_the_last_complete_step_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = trainer_of(), make_batch()
    assert batch.labels is not None
    placed = trainer.place(data.Batch(batch.images.numpy(), batch.labels.numpy()))
    trainer.step(placed, lr=0.01)
    before, lost = trainer.state(), PeerLost("gone")

    def fails(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(step, "batch_loss", fails)
        with pytest.raises(InputError, match="must fit into memory"):
            trainer.step(placed, lr=0.01)
    after = trainer.state_alone(lost)
    assert after is not None
    assert (after.nimg, after.steps) == (12, 1)
    assert all(np.array_equal(after.moments1[name], array) for name, array in before.moments1.items())
    ends = []
    for state in (before, after):  # whose weights the failed step has forced already
        resumed = trainer_of()
        resumed.load_state(state)
        resumed.step(placed, lr=0.01)
        ends.append(resumed.parameters())
    for name, array in ends[0].items():
        np.testing.assert_allclose(ends[1][name], array, rtol=1e-5, atol=1e-4)  # a hundredth of a step

    with monkeypatch.context() as patched:  # messages between GPUs may have ended with anything
        patched.setattr(trainer, "world", 2)
        patched.setattr(trainer, "_device", torch.device("cuda"))
        assert trainer.state_alone(lost) is None
        assert trainer.state_alone(InputError("a full disk")) is not None
    monkeypatch.setattr(trainer.learner.ema, "update", fails)
    with pytest.raises(InputError, match="must fit into memory"):
        trainer.step(placed, lr=0.01)
    assert trainer.state_alone(InputError("memory")) is None


def test_what_is_dropped_of_an_image_is_a_function_of_its_seed_alone() -> None:
    """However the batch is divided; PyTorch's generator, which would be the same in each order, is not asked."""
    network, batch = make_network(dropout=0.5).train(), make_batch()
    seeds = torch.arange(len(batch.images), dtype=torch.int32) * 7919
    torch.manual_seed(0)
    whole = batch_loss(network, batch._replace(dropout=seeds))
    parts = torch.cat([batch_loss(network, part) for part in batch._replace(dropout=seeds).split(3)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(batch_loss(network, batch._replace(dropout=seeds + 1)), whole)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())


def test_dropped_elements_are_as_many_as_asked_independent_and_scaled() -> None:
    """Shares and products of neighbours, images and layers within five standard deviations; the mean stays 1."""
    modules = nn.Sequential(Dropout(0.3), Dropout(0.3)).train()
    with dropping(modules, torch.arange(64, dtype=torch.int32)):
        one, other = (module(torch.ones(64, 8, 16, 16)) for module in modules)
    count = one.numel()
    kept = (one > 0).double()
    assert one.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / count) ** 0.5
    for moved in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 3), (other > 0).double()):
        correlation = ((kept - 0.7) * (moved - 0.7)).mean() / 0.21
        assert abs(correlation) < 5 * count**-0.5
