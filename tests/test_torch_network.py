"""The PyTorch network beyond what the conformance suite asks of every port: backbones, initial weights, activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_torch_step import CONFIG, Mlp, make_batch, make_network, points

from backends.torch.attention import attended
from backends.torch.denoiser import Denoiser, evaluating
from backends.torch.network import Network
from backends.torch.telemetry import layers_of, measured_forward
from backends.torch.weights import tensors
from edm2_core import precond
from edm2_core.ladder import LADDER
from edm2_core.network import initialize, plan


def test_a_denoiser_of_any_backbone_is_that_of_the_specification() -> None:
    backbone, batch = Mlp(), points()
    denoiser = Denoiser(backbone, sigma_data=0.7)
    denoised, logvar = denoiser(batch.images, batch.sigma, batch.labels)
    wanted = precond.denoise(
        lambda x, c_noise: backbone(x, c_noise, batch.labels), batch.images, batch.sigma, sigma_data=0.7
    )
    torch.testing.assert_close(denoised, wanted)
    assert torch.equal(logvar, torch.zeros(8, 1))
    uncertain = Denoiser(backbone, uncertainty=torch.nn.Unflatten(0, (-1, 1)))
    torch.testing.assert_close(uncertain(batch.images, batch.sigma)[1], batch.sigma.log() / 4)


def test_a_backbone_computes_in_the_dtype_asked_for() -> None:
    batch, denoiser = points(), Denoiser(Mlp().bfloat16(), dtype=torch.bfloat16)
    denoiser.backbone.register_forward_pre_hook(lambda _, args: (args[0], args[1].bfloat16(), args[2].bfloat16()))
    assert denoiser(batch.images, batch.sigma, batch.labels)[0].dtype == torch.float32


def test_evaluation_leaves_every_module_in_the_mode_it_had() -> None:
    network = make_network().train()
    network.unet.out_conv.eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert {name for name, module in network.named_modules() if not module.training} == {"unet.out_conv"}


@pytest.mark.parametrize("rung", ["A", "B", "D", "G"])
def test_initial_weights_have_the_distributions_of_the_specification(rung: str) -> None:
    config = replace(CONFIG, switches=LADDER[rung], model_channels=32)
    torch.manual_seed(0)
    own, wanted = tensors(Network(config)), initialize(config, seed=0)
    assert own.keys() == wanted.keys()
    for name, parameter in plan(config).parameters.items():
        ours, theirs = own[name].detach().numpy(), wanted[name]
        if parameter.init in ("normal", "he", "frequencies", "phases"):
            assert not np.array_equal(ours, theirs), name
            error = 6 * np.sqrt(2 / theirs.size)  # six standard errors of the difference, in units of the spread
            if theirs.size >= 32:
                assert abs(ours.mean() - theirs.mean()) < error * theirs.std(), name
                assert abs(ours.std() / theirs.std() - 1) < error, name
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_initial_weights_follow_the_seed_and_can_be_drawn_again() -> None:
    def seeded() -> Network:
        torch.manual_seed(7)
        return Network(CONFIG)

    one, other = seeded(), seeded()
    assert all(torch.equal(tensors(one)[name], tensor) for name, tensor in tensors(other).items())
    other.unet.out_conv.reset_parameters()
    changed = {name for name, tensor in tensors(one).items() if not torch.equal(tensors(other)[name], tensor)}
    assert changed == {"unet.out_conv.weight"}


def test_building_from_parameters_draws_nothing() -> None:
    before = torch.get_rng_state()
    make_network()
    assert torch.equal(torch.get_rng_state(), before)


def test_activations_are_the_outputs_of_layers_compiled_or_not() -> None:
    """The last layer's are read off the network's answer, others are positive; no hook is left behind."""
    network, batch = make_network().train(), make_batch()
    names = list(layers_of(network))
    forward = measured_forward(network, batch, names, size=5)
    captured: list[torch.Tensor] = []
    hook = network.unet.register_forward_hook(lambda module, args, output: captured.append(output))
    network(batch.images + batch.unit_noise * batch.sigma, batch.sigma, batch.labels)
    hook.remove()
    rms = captured[0].detach().square().mean(dim=(2, 3)).sqrt()
    torch.testing.assert_close(forward.activations["unet.out_conv.weight"], torch.stack([rms.max(), rms.mean()]))
    assert all((forward.activations[name] > 0).all() for name in names)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    network.eval().compile(backend="eager")
    network(batch.images, batch.sigma, batch.labels)
    again = measured_forward(network, batch, names, size=None)
    for name in names:
        torch.testing.assert_close(again.activations[name], forward.activations[name])


def test_activations_exclude_the_factor_of_the_sum_that_follows() -> None:
    """The balance of that sum has no effect on what enters the first block's last convolution."""
    name, batch = "unet.enc.8x8_block0.conv_res1.weight", make_batch()
    one, other = (
        measured_forward(make_network(res_balance=t), batch, [name], size=None).activations[name] for t in (0.3, 0.6)
    )
    torch.testing.assert_close(one, other)


def test_one_hot_labels_may_be_of_any_dtype() -> None:
    network, batch = make_network(), make_batch()
    assert batch.labels is not None
    one, other = (network(batch.images, batch.sigma, labels)[0] for labels in (batch.labels, batch.labels.long()))
    assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [16, 256])
def test_attention_in_bfloat16_is_that_of_float32_within_its_rounding(tokens):
    q, k, v = (torch.nn.functional.normalize(torch.randn(2, 3, tokens, 32), dim=-1) * 32**0.5 for _ in range(3))
    wanted = attended(q, k, v)
    got = attended(*(x.bfloat16() for x in (q, k, v)))
    assert got.dtype == torch.bfloat16
    # scores of at most sqrt(32), rounded to 8 bits, and so are weights and values
    assert (got.float() - wanted).norm() < 8 * 2**-8 * wanted.norm()
