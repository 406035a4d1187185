"""The Python interface of the JAX port: load a network, sample from it, train one.

    network = load("runs/00000-digits", sigma_rel=0.15)
    noise = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))              # NHWC
    images = sample(network, noise, jax.numpy.eye(10), guidance=2.0, num_steps=16)
    denoised, logvar = network(images, jax.numpy.ones((10, 1, 1, 1)), jax.numpy.eye(10))

Arrays are those of JAX: images [N, H, W, C] for our own network; for another one, data as its backbone takes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from backends.pipeline.data.datasets import Dataset
from backends.pipeline.data.labels import check_labels
from backends.pipeline.runs import networks, training
from backends.pipeline.runs.config import TrainConfig
from backends.pipeline.runs.folder import Run
from backends.ports import Machine

from . import device as devices
from . import trajectory
from .denoiser import Network, SamplingDenoiser
from .network import load_network
from .port import Port
from .trainer import JaxTrainer


def load(
    path: str | Path,
    *,
    device: str | jax.Device | None = None,
    sigma_rel: float | None = None,
    dtype: Any = jnp.float32,
) -> Network:
    """The network in a run folder or a snapshot file, ready to use, with its ``config``.

    Args:
        path: a run folder of any port, or one of its snapshots.
        device: where its parameters are: a device, cpu, gpu or tpu, or one of them as in gpu:1; None: JAX's default.
        sigma_rel: length of the average, reconstructed where a run did not store it. None: see
            :func:`backends.pipeline.runs.networks.stored_network`.
        dtype: of activations; parameters are float32.

    Raises:
        InputError: no such file, run, length or device.
    """
    stored = networks.stored_network(path, sigma_rel=sigma_rel)
    place = devices.choose_one(device) if isinstance(device, str) else device
    with jax.default_device(place):
        network = load_network(stored.required_config(), stored.params, dtype=dtype)
    return network if place is None else jax.device_put(network, place)


def sample(
    network: Network, noise: Array, labels: Array | None = None, *, guide: Network | None = None, **options: Any
) -> Array:
    """Images, or data of any shape, from standard normal ``noise``, computed where the network's parameters are.

    Args:
        network: of :func:`load`, or ``Network(denoise, params)`` of any denoiser.
        noise: [N, ...]; [N, H, W, C] for our own network. The result is shaped like it.
        labels: one-hot [N, label_dim], or None.
        guide: another network of such data; None: the network itself without its label, if it was trained with
            label dropout.
        options: ``condition``, ``guidance`` and ``guide_interval`` of :func:`backends.ports.sample`; and those of
            :func:`edm2_core.sampler.sample`, such as ``num_steps``, ``sigmas``, ``callback`` and ``churn_noise``.

    Without a callback, the trajectory is one program, compiled for each shape and number of steps. Matrix products are
    in :data:`~.device.SAMPLING_MATMUL`, as in the commands.

    Raises:
        InputError: as :func:`~backends.pipeline.data.labels.check_labels`, :func:`backends.ports.sample` and
            :func:`edm2_core.sampler.sample`.
    """
    check_labels(network, guide, labels, options.get("guidance", 1.0))
    other = None if guide is None else SamplingDenoiser(guide)
    with jax.default_matmul_precision(devices.SAMPLING_MATMUL):
        return trajectory.sample(SamplingDenoiser(network), noise, labels, guide=other, **options)


def train(
    config: TrainConfig,
    dataset: Dataset,
    *,
    outdir: str | Path | None = None,
    machine: Machine = Machine(),
    picture: bool = True,
    log: Sequence[str] = (),
) -> Run | None:
    """Train ``config`` on ``dataset``: see :func:`backends.pipeline.runs.training.train`.

    All devices of ``machine.device`` share each batch. With several processes, call
    :func:`backends.jax.device.join` first.
    """
    open_sampler = Port(device=devices.choose_one(machine.device)).sampler
    return training.train(
        config,
        dataset,
        JaxTrainer,
        open_sampler,
        outdir=outdir,
        machine=machine,
        picture=picture,
        log=log,
        prog="python -m backends.jax.train",
    )
