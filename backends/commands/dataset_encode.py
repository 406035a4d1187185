"""edm2 dataset encode: images as latents of an autoencoder."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.data.encode import encode
from backends.pipeline.runs.progress import Progress
from edm2_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 dataset encode`` and ``decode``."""

    source: tyro.conf.Positional[Path]
    """The data to encode or decode."""
    dest: tyro.conf.Positional[Path]
    """What to write: a .zip, or a folder."""
    vae: str | None = None
    """Autoencoder: a folder in diffusers' layout, or an ID of the hub. To decode: without it, the one of the latents.
    """
    batch: int = 8
    """Images at a time."""
    device: str | None = None
    """Device to compute on. Without it: the fastest available."""


def autoencoders() -> Any:
    """The port that encodes and decodes here, imported late because PyTorch takes seconds."""
    return import_module("backends.torch.vae")


def run(options: Options) -> None:
    """Write the latents and say what they are.

    Raises:
        InputError: no autoencoder, PyTorch or diffusers; data that are not RGB images; or an output that exists.
    """
    if options.vae is None:
        raise InputError("--vae must name an autoencoder, got none: stabilityai/sd-vae-ft-mse is that of the paper")
    dataset = open_dataset(options.source)
    name = str(Path(options.vae).resolve()) if Path(options.vae).is_dir() else options.vae
    encoder = autoencoders().open_encoder(name, options.device)
    with Progress(total=len(dataset)) as progress:
        made = encode(dataset, options.dest, encoder, name=name, batch=options.batch, progress=progress.done)
    print(f"wrote     {options.dest}: {len(dataset)} latents of {made.encoder}")
    print(f"mean      {' '.join(f'{value:.4g}' for value in made.mean)}")
    print(f"std       {' '.join(f'{value:.4g}' for value in made.std)}")
