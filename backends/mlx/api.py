"""Load, sample and train in a few calls.

    network = load("runs/0001-digits")                                  # a Network, with .config
    images = sample(network, mx.random.normal((16, 8, 8, 1)), one_hot, guidance=2.0)
    run = train(config, dataset)                                        # as python -m backends.mlx.train does

Arrays are MLX's own, images in its layout [N, H, W, C].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from backends import ports
from backends.pipeline.data.datasets import Dataset
from backends.pipeline.data.labels import check_labels
from backends.pipeline.runs import networks, training
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.ports import Machine

from . import device as devices
from .denoiser import Denoiser, SamplingDenoiser
from .network import Network
from .port import Port
from .trainer import MLXTrainer
from .weights import build

__all__ = ["Denoiser", "Network", "load", "sample", "train"]

PROG = "python -m backends.mlx.train"


def load(
    path: str | Path,
    *,
    device: str | None = None,
    sigma_rel: float | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Network:
    """A stored network, ready to use, with its ``config``.

    Args:
        path: a snapshot file or a run folder.
        device: gpu or cpu, which becomes MLX's default device. MLX's arrays have no device of their own. Default:
            MLX's default device stays.
        sigma_rel: length of a run's average, reconstructed unless it is stored. Default: 0.10 where it is stored, else
            the longest.
        dtype: of activations: float32, bfloat16 or float16.

    Raises:
        InputError: nothing is stored there, it is damaged or no network of edm2's; or there is no such device.
    """
    if device is not None:
        mx.set_default_device(devices.choose(device))
    snapshot = networks.stored_network(path, sigma_rel=sigma_rel)
    return build(snapshot.required_config(), snapshot.params, dtype=dtype)


def sample(
    network: Denoiser, noise: mx.array, labels: mx.array | None = None, *, guide: Denoiser | None = None, **options: Any
) -> mx.array:
    """Images, or data of any shape, from standard normal ``noise``, on MLX's default device.

    Args:
        network: any denoiser.
        noise: float32 [N, ...]; for a :class:`Network` [N, H, W, C], channels last. The result is shaped like it.
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
    images: mx.array = ports.sample(SamplingDenoiser(network), noise, labels, guide=other, **options)
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
    """Train a network. See :func:`backends.pipeline.runs.training.train`, also for errors.

    Args:
        outdir: the run folder; training continues from where a run in it stopped. Default: a new one under runs/.
        machine: the device, and how many images it takes at a time. Default: the fastest device, all at once.
        picture: draw averages of several lengths at the end.
        log: names of experiment trackers, such as tensorboard.
    """
    open_sampler = Port(device=machine.device).sampler
    return training.train(
        config, dataset, MLXTrainer, open_sampler, outdir=outdir, machine=machine, picture=picture, log=log, prog=PROG
    )
