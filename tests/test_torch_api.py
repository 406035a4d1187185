"""EDM2 from Python in PyTorch: load, sample, train, and what importing the package costs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_torch_step import CONFIG, Mlp, make_network

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.ports import Machine
from backends.torch import api, load
from backends.torch.port import PORT
from backends.torch.weights import dump, tensors
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.presets import Hyperparameters
from edm2_core.sampler import Step, Stop


def one_hot(count: int) -> torch.Tensor:
    return torch.eye(3)[torch.arange(count) % 3]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def stored(folder: Path, length: float, shift: float = 0.0) -> Path:
    params = {name: array + np.float32(shift) for name, array in dump(tensors(make_network())).items()}
    path = folder / snapshot_name(2000, Length.of(length))
    save_snapshot(path, Snapshot(params=params, config=CONFIG, nimg=2000, length=Length.of(length)))
    return path


def test_importing_the_package_loads_no_framework() -> None:
    code = "import backends.torch, sys; print(sorted({'torch', 'numpy', 'backends.pipeline'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(ImportError, match="nothing_of_this_name"):
        from backends.torch import nothing_of_this_name  # noqa: F401


def test_a_loaded_snapshot_is_a_network_ready_to_use(tmp_path: Path) -> None:
    network = load(stored(tmp_path, 0.1), device="cpu")
    assert isinstance(network, torch.nn.Module)
    assert network.config == CONFIG
    assert not network.training
    own, wanted = tensors(network), tensors(make_network())
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-3, atol=1e-4)  # stored in float16
    assert load(tmp_path / snapshot_name(2000, Length.of(0.1)), device="cpu", dtype=torch.bfloat16)(
        noise(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    )[0].isfinite().all()  # fmt: skip


def test_a_run_folder_means_its_usual_average_or_the_one_asked_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_config(TrainConfig(network=CONFIG))
    for length, shift in ((0.05, 1.0), (0.1, 2.0)):
        stored(run.snapshots_path, length, shift)
    usual, other = (load(tmp_path, device="cpu", sigma_rel=length).unet.out_gain for length in (None, 0.05))
    assert (usual.item(), other.item()) == (2.5, 1.5)


def test_sampling_is_that_of_the_port() -> None:
    network, start, labels = make_network(label_dropout=0.1), noise(4, 1, 8, 8), one_hot(4)
    images = api.sample(network, start, labels, guidance=2.0, num_steps=4)
    params = dump(tensors(network))
    wanted = PORT.sample(CONFIG, params, start.numpy(), labels.numpy(), guidance=2.0, num_steps=4)
    np.testing.assert_allclose(images.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_sampling_takes_levels_and_a_callback() -> None:
    network, steps = make_network(), []

    def watch(step: Step) -> None:
        steps.append(step.sigma)
        if len(steps) == 2:
            raise Stop

    images = api.sample(network, noise(2, 1, 8, 8), one_hot(2), sigmas=[10.0, 3.0, 1.0, 0.0], callback=watch)
    assert steps == [3.0, 1.0]
    assert images.std() > 0.5  # still noisy


def test_sampling_leaves_dropout_out_and_the_mode_as_it_was() -> None:
    network = make_network(dropout=0.5).train()
    one, other = (api.sample(network, noise(2, 1, 8, 8), one_hot(2), num_steps=2) for _ in range(2))
    assert torch.equal(one, other)
    assert network.training


def test_any_denoiser_can_be_sampled_and_guide() -> None:
    torch.manual_seed(0)
    network, guide = (api.Denoiser(Mlp(), label_dim=n) for n in (3, 0))
    plain, guided = (
        api.sample(network, noise(5, 2), one_hot(5), guide=guide, guidance=w, num_steps=3) for w in (1.0, 2.0)
    )
    assert plain.shape == guided.shape == (5, 2)
    assert not torch.equal(plain, guided)


def test_a_network_never_trained_without_its_label_is_not_sampled_without_it() -> None:
    network, start = make_network(), noise(4, 1, 8, 8)
    with pytest.raises(InputError, match="that guides itself must be trained with label dropout, got label_dropout 0"):
        api.sample(network, start, one_hot(4), guidance=2.0)
    with pytest.raises(InputError, match="label_dropout 0 must be sampled with labels, got None"):
        api.sample(network, start)
    with pytest.raises(InputError, match="guidance without a guide needs labels, got a network that takes none"):
        api.sample(make_network(label_dim=0), start, one_hot(4), guidance=2.0)
    assert api.sample(make_network(label_dropout=0.1), start, num_steps=1).shape == start.shape


def test_labels_that_are_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"one-hot rows of shape \(4, 3\), got \(4,\)"):
        api.sample(make_network(), noise(4, 1, 8, 8), torch.arange(4))


def test_training_from_python_makes_a_run_that_loads_and_resumes(tmp_path: Path) -> None:
    network = replace(CONFIG, label_dim=10, label_dropout=0.2)
    hyper = Hyperparameters(duration=2048, batch=64, snapshot=1000)
    config, data = TrainConfig(network=network, hyper=hyper), open_dataset("digits")
    run = api.train(config, data, outdir=tmp_path / "run", machine=Machine(device="cpu"))
    assert run is not None
    assert load(run.path, device="cpu").config == network
    longer = replace(config, hyper=replace(hyper, duration=2112))
    assert api.train(longer, data, outdir=run.path, machine=Machine(device="cpu")) is not None
    assert run.state_nimg() == 2112
