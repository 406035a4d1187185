"""EDM2 from Python: load a trained network, sample, train.

    network = load("runs/00000-digits", sigma_rel=0.15)       # an nn.Module, with .config
    images = sample(network, torch.randn(16, 1, 8, 8), labels, guidance=2.0)
    run = train(config, dataset)                              # as the train command does

:class:`Denoiser` makes a denoiser of any network, :class:`Network` is the EDM2 one with initial weights;
:mod:`.step` trains either, :class:`.ema.PowerEMA` averages any module.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends import ports
from backends.pipeline.data.datasets import Dataset
from backends.pipeline.data.labels import check_labels
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.networks import stored_network
from backends.pipeline.runs.training import train as run_train
from backends.ports import Machine

from . import device as devices
from .compiling import made_ready
from .denoiser import Denoiser, SamplingDenoiser, evaluating
from .network import Network
from .port import Port
from .trainer import TorchTrainer
from .weights import build

__all__ = ["Denoiser", "Machine", "Network", "load", "sample", "train"]


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    sigma_rel: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A trained network in evaluation mode, with its ``config``.

    Args:
        path: a snapshot file, or a run folder: then its newest average of length ``sigma_rel``.
        device: where it computes; None: the fastest device available.
        sigma_rel: length of the average, reconstructed where it is not stored; None: 0.10 if stored, else the longest.
        dtype: of activations.

    Raises:
        InputError: no such file, run or device; a damaged file; or a length that cannot be reconstructed.
    """
    snapshot = stored_network(path, sigma_rel=sigma_rel)
    place = devices.choose(None if device is None else str(device))
    network = build(snapshot.required_config(), snapshot.params, device=place, dtype=dtype)
    made_ready(network, place, None)
    network.format = snapshot.data
    return network


@torch.inference_mode()
def sample(
    network: Denoiser, noise: Tensor, labels: Tensor | None = None, *, guide: Denoiser | None = None, **options: Any
) -> Tensor:
    """Images, or data of any shape, from standard normal ``noise``.

    Args:
        network: any denoiser; it computes in evaluation mode and is left in the mode it had.
        noise: [N, ...], on the network's device; the result is shaped like it.
        labels: one-hot [N, label_dim], or None.
        guide: another denoiser of such data; None: the network itself without its label, if it was trained with
            label dropout.
        options: ``condition``, ``guidance`` and ``guide_interval`` of :func:`backends.ports.sample`; and those of
            :func:`edm2_core.sampler.sample`, such as ``num_steps``, ``sigmas``, ``callback`` and ``churn_noise``.

    Raises:
        InputError: as :func:`~backends.pipeline.data.labels.check_labels`, :func:`backends.ports.sample` and
            :func:`edm2_core.sampler.sample`.
    """
    check_labels(network, guide, labels, options.get("guidance", 1.0))
    other = None if guide is None else SamplingDenoiser(guide)
    with devices.full_precision(), evaluating(*(net for net in (network, guide) if net is not None)):
        images: Tensor = ports.sample(SamplingDenoiser(network), noise, labels, guide=other, **options)
    return images


def train(
    config: TrainConfig,
    dataset: Dataset,
    *,
    outdir: str | Path | None = None,
    machine: Machine = Machine(),
    picture: bool = True,
    log: Sequence[str] = (),
) -> Run | None:
    """Train as ``python -m backends.torch.train`` does. Returns the run; None in processes other than the first.

    Args:
        config: everything that determines the result.
        dataset: see :func:`backends.pipeline.data.datasets.open_dataset`.
        outdir: the run folder; a run that stopped in it is resumed. None: a new one under ``runs/``.
        machine: device and images per device; by default the fastest device available.
        picture: draw averages of several lengths at the end.
        log: names of experiment trackers, such as tensorboard.

    Raises:
        InputError, KeyboardInterrupt: as :func:`backends.pipeline.runs.training.train`.
    """
    sampler = Port(device=str(devices.choose(machine.device))).sampler
    return run_train(
        config,
        dataset,
        TorchTrainer,
        sampler,
        outdir=outdir,
        machine=machine,
        picture=picture,
        log=log,
        prog="python -m backends.torch.train",
    )
