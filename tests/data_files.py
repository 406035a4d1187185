"""Files of data that tests make, and the folder or archive that holds them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.pipeline.data.datasets import open_dataset
from edm2_core.errors import InputError

Pack = Callable[[Path], Path]


def as_folder(folder: Path) -> Path:
    return folder


def as_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder.parent / "packed"), "zip", folder))


def write(path: Path, *, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Writes random pixels and returns them as [H, W] or [H, W, C]."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = (
        np.random.default_rng(seed)
        .integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
        .squeeze(2 if bands == 1 else ())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes(mode, size, pixels.tobytes()).save(path)
    return pixels


def refused(path: Path, match: str) -> None:
    """Opening ``path`` must fail with a message of one line."""
    with pytest.raises(InputError, match=match) as caught:
        open_dataset(str(path))
    assert "\n" not in str(caught.value)
