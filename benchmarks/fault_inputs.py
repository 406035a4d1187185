"""What :mod:`benchmarks.faults` damages, the commands that it kills, and what they work on."""

import sys
from contextlib import chdir, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SMALL = "--channels 16 --channels-per-head 16 --batch 64 --rampup 0 --checkpoint 128 --snapshot 1000 --device cpu"
POOLED = """
def features(images):
    return images.reshape(len(images), -1, 4).mean(axis=2)
"""


COMMANDS = {
    "edm2 reconstruct": ("backends.commands.cli", "reconstruct run --sigma-rels 0.06 0.12 0.2 --outdir averages"),
    "edm2 dataset convert": (
        "backends.commands.cli",
        "dataset convert pictures converted.zip --resolution 16x16 --transform center-crop",
    ),
    "edm2 dataset encode": (
        "backends.commands.cli",
        "dataset encode data.zip latents.zip --vae ../inputs/vae --device cpu",  # its path is in what is written
    ),
    "edm2 sweep": (
        "backends.commands.cli",
        "sweep --run run --metric frechet@pooled:features --vary sigma-rel=0.05:0.2 --search grid --grid 4 "
        "--seeds 0-99 --steps 6 --device cpu",
    ),
    "torch: sample": (
        "backends.torch.sample",
        "--run run --seeds 0-199 --steps 12 --device cpu --batch 10 --skip-existing --outdir samples",
    ),
}


def make_inputs() -> None:
    """A run and a folder of pictures, for the commands that need them."""
    Path("inputs").mkdir()
    with chdir("inputs"), redirect_stdout(sys.stderr):
        import_module("backends.torch.train").main(f"{SMALL} --duration 4Ki --no-picture --outdir run".split())
        Path("pictures").mkdir()
        rng = np.random.default_rng(0)
        for i in range(300):
            folder = Path("pictures") / f"class{i % 3}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i:03d}.png")
        for dest in ("data", "data.zip"):
            words = f"dataset convert pictures {dest} --resolution 8x8 --transform center-crop"
            import_module("backends.commands.cli").main(words.split())
        Path("pooled.py").write_text(POOLED, encoding="utf-8")
        small_autoencoder().save_pretrained("vae")


def small_autoencoder() -> Any:
    """One of diffusers, with weights that were drawn."""
    import diffusers
    import torch

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, **blocks)
