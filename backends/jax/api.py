"""The Python face of this port: load a network, sample from it, train one.

    network = load("runs/00000-digits", sigma_rel=0.15)
    noise = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))              # NHWC
    images = sample(network, noise, jax.nn.one_hot(range(16), 10), guidance=2.0, num_steps=16)

Arrays are native, images NHWC: [N, H, W, C] for our own network, and whatever the backbone takes for any other.
"""

from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Any

import jax
from jax import Array

from backends.pipeline.data.datasets import Dataset
from backends.pipeline.runs import sampling, training
from backends.pipeline.runs.config import Precision, TrainConfig
from backends.pipeline.runs.folder import Run
from backends.ports import LabelledDenoiser, Machine, guided_denoiser
from edm2_core import sampler

from . import device as devices
from .denoiser import Network
from .port import Port
from .trainer import JaxTrainer


def load(
    path: str | Path, /, *, device: str | None = None, sigma_rel: float | None = None, dtype: Precision = "float32"
) -> Network:
    """The network in a run folder or a snapshot file, ready to use, with its ``config``.

    Args:
        path: a run folder of any port, or one of its snapshots.
        device: cpu, gpu or tpu, or one of them as in gpu:1; None: JAX's default device.
        sigma_rel: length of the average, reconstructed where a run did not store it. None: see
            :func:`backends.pipeline.runs.sampling.stored_network`.
        dtype: of activations; parameters are float32.

    Raises:
        InputError: no such file, run, length or device.
    """
    stored = sampling.stored_network(path, sigma_rel=sigma_rel)
    port = Port(device=None if device is None else devices.choose_one(device), precision=dtype)
    with port.place():
        return port.denoiser(stored.required_config(), stored.params)


def sample(
    network: LabelledDenoiser,
    noise: Array,
    labels: Array | None = None,
    *,
    guide: LabelledDenoiser | None = None,
    guidance: float = 1.0,
    guide_interval: tuple[float, float] = (0.0, inf),
    churn_noise: Iterable[Array] | None = None,
    **solver: Any,
) -> Array:
    """Images from standard normal ``noise``, of its shape, computed where the network's parameters are.

    Args:
        network: of :func:`load`, or ``Network(denoise, params)`` of any denoiser.
        noise: [N, ...]; NHWC for our own network.
        labels: one-hot [N, label_dim], or None.
        guide: None with guidance other than 1 is the network itself without its label.
        guidance, guide_interval: see :func:`edm2_core.sampler.guided`.
        churn_noise, solver: options of :func:`edm2_core.sampler.sample`, ``sigmas`` and ``callback`` among them.

    Matrix products are in :data:`~.device.SAMPLING_MATMUL`, as in the commands.

    Raises:
        InputError: as :func:`edm2_core.sampler.sample` and :func:`backends.ports.guided_denoiser`.
    """
    with jax.default_matmul_precision(devices.SAMPLING_MATMUL):
        denoise = guided_denoiser(network, labels, guide=guide, guidance=guidance, guide_interval=guide_interval)
        images: Array = sampler.sample(denoise, noise, churn_noise=churn_noise, **solver)
        return images


def train(
    config: TrainConfig, dataset: Dataset, *, outdir: str | Path | None = None, machine: Machine = Machine()
) -> Run | None:
    """Train ``config`` on ``dataset``: see :func:`backends.pipeline.runs.training.train`.

    All devices of ``machine.device`` share each batch. With several processes, call
    :func:`backends.jax.device.join` first.
    """
    open_sampler = Port(device=devices.choose_one(machine.device)).sampler
    return training.train(
        config, dataset, JaxTrainer, open_sampler, outdir=outdir, machine=machine, prog="python -m backends.jax.train"
    )
