"""Autoencoders of latents, by diffusers: decoding after sampling, encoding of a dataset."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from backends.pipeline.checkpoints.autoencoder import AutoencoderConfig, local_folder, read_autoencoder
from edm2_core.errors import InputError

from . import device as devices


def open_decoder(
    name: str, device: str | None = None, only_local: bool = False, /
) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of an autoencoder, a folder or an ID of the hub.

    It takes latents in the autoencoder's own units (not scaled), float32 [N, C, h, w], to images, float32 [N, 3, H, W],
    nominally from -1 to 1.

    Raises:
        InputError: as :func:`_load`.
    """
    vae, place, config = _load(name, device, only_local)

    @torch.inference_mode()
    def decode(latents: np.ndarray) -> np.ndarray:
        config.check_latents(latents)
        with devices.full_precision():
            images = [vae.decode(part[None]).sample for part in torch.from_numpy(latents).to(place)]
        return torch.cat(images).float().cpu().numpy()

    return decode


def open_encoder(name: str, device: str | None = None, /) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder of an autoencoder: images, float32 [N, 3, H, W] from -1 to 1, to moments, float32 [N, 2 C, h, w]:
    means, then standard deviations, in the autoencoder's own units.

    Raises:
        InputError: as :func:`_load`.
    """
    vae, place, config = _load(name, device, False)

    @torch.inference_mode()
    def encode(images: np.ndarray) -> np.ndarray:
        config.check_images(images)
        with devices.full_precision():
            moments = vae.encode(torch.from_numpy(images).to(place)).latent_dist
        return torch.cat([moments.mean, moments.std], dim=1).float().cpu().numpy()

    return encode


def _load(name: str, device: str | None, only_local: bool) -> tuple[Any, torch.device, AutoencoderConfig]:
    """Raises InputError: no such autoencoder, one that cannot be read, or diffusers is not installed."""
    folder = local_folder(name, only_local=only_local)
    config = read_autoencoder(folder).config  # its errors are one line each
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise InputError("latents are decoded by diffusers, got none installed: pip install diffusers") from error
    place = devices.choose(device)
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    return vae.to(place).eval(), place, config
