"""Latents of an autoencoder as data, one .npy each: the official archive, or any with a manifest.

The manifest ``latents.json``, at the root, says what they are:

    {"encoder": "stabilityai/sd-vae-ft-mse", "moments": true, "mean": [...], "std": [...]}

``moments``: a file holds means and standard deviations, so twice as many channels as ``mean`` and ``std``, which are
those of the latents themselves. The official archive has no manifest: its names and its 8 channels tell.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edm2_core.codec import SD_LATENTS, Codec
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .files import Files, find

MANIFEST = "latents.json"
OFFICIAL_ENCODER = "stabilityai/sd-vae-ft-mse"
OFFICIAL_NAME = re.compile(r"(.*/)?img-mean-std-\d+\.npy")


@dataclass(frozen=True)
class Manifest:
    """What latents are; see the module."""

    encoder: str
    moments: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def codec(self) -> Codec:
        stored = "moments" if self.moments else "float32"
        return Codec.standardizing(self.mean, self.std, stored=stored, vae=self.encoder)

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1) + "\n"


def are_latents(files: Files, indices: Sequence[int], /) -> bool:
    """Whether there is a manifest, or the names are those of the official archive."""
    return find(files, MANIFEST) is not None or OFFICIAL_NAME.fullmatch(files.names[indices[0]]) is not None


def codec_of(files: Files, shape: tuple[int, int, int], /) -> Codec:
    """The codec of latents, of which a file has ``shape``.

    Raises:
        InputError: no manifest, a broken one, or one for other channels.
    """
    index = find(files, MANIFEST)
    if index is None:
        if shape[0] != 2 * len(SD_LATENTS[0]) or not any(map(OFFICIAL_NAME.fullmatch, files.names)):
            raise InputError(
                f"latents must have a {MANIFEST} with encoder, moments, mean and std, got none in {files.path}: write "
                "it, or encode images with edm2 dataset encode"
            )
        return Manifest(OFFICIAL_ENCODER, True, *SD_LATENTS).codec
    manifest = _parsed(bytes(files.read(index)), f"{files.path}/{MANIFEST}")
    channels = len(manifest.mean) * (2 if manifest.moments else 1)
    if channels != shape[0]:
        raise InputError(
            f"{files.path}/{MANIFEST} must fit the latents, got {channels} channels for {shape[0]}: correct it"
        )
    return manifest.codec


def _parsed(content: bytes, where: str) -> Manifest:
    try:
        values: dict[str, Any] = parse_json(content)
        mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
        if not isinstance(values["encoder"], str) or not isinstance(values["moments"], bool):
            raise ValueError("encoder must be text and moments true or false")
        if len(mean) != len(std) or not mean:
            raise ValueError("mean and std must have a number for each channel")
        manifest = Manifest(values["encoder"], values["moments"], mean, std)
        _ = manifest.codec
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} must have encoder, moments, mean and std, got '{error}': correct it") from error
    return manifest
