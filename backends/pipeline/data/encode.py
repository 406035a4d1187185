"""Images to latents of an autoencoder, and back, as datasets."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from edm2_core.codec import SD_LATENTS
from edm2_core.errors import InputError

from . import file_labels, latents
from .convert import write_set
from .datasets import StoredDataset
from .file_labels import MANIFEST

_EPS = 1e-12


def encode(
    dataset: StoredDataset,
    dest: Path,
    encoder: Callable[[np.ndarray], np.ndarray],
    /,
    *,
    name: str,
    batch: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> latents.Manifest:
    """Write the moments of the images of ``dataset`` in the official layout, with a manifest.

    ``encoder`` takes images, float32 [n, 3, H, W] from -1 to 1, to moments [n, 2 C, h, w]. ``name`` is the
    autoencoder's; the latents of Stable Diffusion's get their published statistics, others their own.

    Raises:
        InputError: data that are not RGB images, or an output that exists.
    """
    if dataset.format.codec.stored != "uint8" or dataset.shape[0] != 3:
        raise InputError(f"data to encode must be 8-bit RGB images, got {dataset.shape[0]} channels in {dataset.spec}")
    if dest.exists():
        raise InputError(f"the output must be new, got {dest}, which exists: choose another name, or remove it")
    measured = _Moments()

    def samples() -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(dataset), batch):
            indices = np.arange(start, min(start + batch, len(dataset)))
            moments = encoder(dataset.format.codec.encode(dataset.read(indices)))
            measured.add(moments)
            for index, moment in zip(indices, moments, strict=True):
                yield f"{index // 1000:05d}/img-mean-std-{index:08d}.npy", _npy(moment)
            progress(len(indices))

    def manifest() -> latents.Manifest:
        official = Path(name).name == Path(latents.OFFICIAL_ENCODER).name and measured.channels == len(SD_LATENTS[0])
        return latents.Manifest(name, True, *(SD_LATENTS if official else measured.statistics()))

    def manifests() -> dict[str, bytes]:
        return {
            MANIFEST: _labels(dataset, lambda i: f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"),
            latents.MANIFEST: manifest().to_json().encode(),
        }

    write_set(dest, samples(), manifests)
    return manifest()


def decode(
    dataset: StoredDataset,
    dest: Path,
    decoder: Callable[[np.ndarray], np.ndarray],
    /,
    *,
    batch: int = 8,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the images of a dataset of latents, of moments those of the means, as PNG in the official layout.

    Raises:
        InputError: data that are no latents, or an output that exists.
    """
    if dataset.format.codec.vae is None:
        raise InputError(f"data to decode must be latents, got others in {dataset.spec}: they need no decoding")
    if dest.exists():
        raise InputError(f"the output must be new, got {dest}, which exists: choose another name, or remove it")

    def samples() -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(dataset), batch):
            indices = np.arange(start, min(start + batch, len(dataset)))
            images = decoder(np.ascontiguousarray(dataset.read(indices)[:, : dataset.shape[0]]))
            pixels = np.rint(images * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
            for index, image in zip(indices, pixels, strict=True):
                yield _png_name(int(index)), _png(image)
            progress(len(indices))

    write_set(dest, samples(), lambda: {MANIFEST: _labels(dataset, _png_name)})


class _Moments:
    """Mean and standard deviation by channel of latents that would be drawn, summed over batches."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, np.zeros(0), np.zeros(0)

    @property
    def channels(self) -> int:
        return len(self._sum)

    def add(self, moments: np.ndarray) -> None:
        mean, std = np.split(moments.astype(np.float64), 2, axis=1)
        if not self._count:
            self._sum, self._squares = np.zeros(mean.shape[1]), np.zeros(mean.shape[1])
        self._count += mean.size // mean.shape[1]
        self._sum += mean.sum(axis=(0, 2, 3))
        self._squares += (mean**2 + std**2).sum(axis=(0, 2, 3))

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, _EPS))
        return tuple(map(float, mean)), tuple(map(float, std))


def _labels(dataset: StoredDataset, name: Callable[[int], str]) -> bytes:
    if not dataset.label_dim:
        return file_labels.manifest(None, ())
    values = dataset.labels(np.arange(len(dataset))).tolist()
    return file_labels.manifest([[name(i), label] for i, label in enumerate(values)], dataset.format.classes)


def _png_name(index: int) -> str:
    return f"{index // 1000:05d}/img{index:08d}.png"


def _npy(array: np.ndarray) -> bytes:
    with BytesIO() as file:
        np.save(file, np.ascontiguousarray(array, np.float32))
        return file.getvalue()


def _png(image: np.ndarray) -> bytes:
    with BytesIO() as file:
        pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        Image.fromarray(pixels).save(file, format="PNG", compress_level=0)
        return file.getvalue()
