"""What makes features of images, by name:

pixels           images shrunk to at most 8x8 by averaging, from 0 to 1; needs nothing
inception        Inception-v3 as FID uses it, 2048 features and class scores, by torch-fidelity
dinov2           DINOv2 ViT-L/14, 1024 features, by transformers
MODULE:FUNCTION  one's own: uint8 [n, channels, height, width] to [n, D]

Sources: arXiv 1706.08500 (Inception), 2304.07193 and 2306.04675 (DINOv2, its size and normalization).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edm2_core.errors import InputError

_SIDE = 8  # pixels
_INCEPTION_HASH = "6726825d"  # of the weights that FID is defined by
_DINOV2 = "facebook/dinov2-large"
_DINOV2_SIDE = 224
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mean and std
KNOWN = ("pixels", "inception", "dinov2")


class Features(NamedTuple):
    """Features [n, D], and class scores before the softmax, [n, classes], or None; float64."""

    values: np.ndarray
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Extractor:
    """``extract`` takes images, uint8 [n, 1 or 3, height, width]. ``weights`` is the SHA-256 of the network's file,
    empty without one."""

    name: str
    weights: str
    extract: Callable[[np.ndarray], Features]


def open_extractor(name: str, /, *, weights: str | None = None, device: str | None = None) -> Extractor:
    """The extractor ``name``.

    Args:
        name: see the module.
        weights: a file for inception, a folder or an ID of the hub for dinov2; None: the published ones, which are
            downloaded if they are not on this machine.
        device: what a port calls the device it makes images on. A network runs there too if PyTorch has a device of
            that name, else (JAX's ``tpu``, MLX's ``gpu``, None) on the fastest that PyTorch has.

    Raises:
        InputError: an unknown name, weights that are missing or do not fit, or a package that is not installed.
    """
    if name == "pixels":
        return Extractor(name, "", lambda images: Features(pixels(images)))
    if ":" in name:
        return _own(name)
    if name not in KNOWN:
        raise InputError(f"an extractor must be one of {', '.join(KNOWN)} or MODULE:FUNCTION, got {name!r}")
    return (_inception if name == "inception" else _dinov2)(weights, device)


def pixels(images: np.ndarray, /) -> np.ndarray:
    """Pixels from 0 to 1 as rows, float64; sides beyond 8 are shrunk to 8 by averaging over areas."""
    height, width = images.shape[2:]
    shrunk = _areas(height) @ (images / 255) @ _areas(width).T
    return shrunk.reshape(len(images), -1)


def _areas(side: int) -> np.ndarray:
    """The share of each of ``side`` pixels in each of at most 8 equal parts, [parts, side]."""
    parts = min(side, _SIDE)
    edges = np.linspace(0, side, parts + 1)
    begin, end = np.arange(side), np.arange(side) + 1
    covered = np.minimum(edges[1:, None], end) - np.maximum(edges[:-1, None], begin)
    return covered.clip(0) * (parts / side)


def own_function(name: str, /, *, what: str) -> Callable[..., Any]:
    """The MODULE:FUNCTION called ``name``. Raises InputError, about ``what``, where it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{what} must be a MODULE:FUNCTION that can be imported, got {name}, '{error}': correct the name, or set "
            "PYTHONPATH to the folder of the module"
        ) from error
    if not callable(function):
        raise InputError(f"{what} must be a function, got {name}, of type {type(function).__name__}: correct the name")
    return function


def _own(name: str) -> Extractor:
    extract = own_function(name, what="an extractor")

    def checked(images: np.ndarray) -> Features:
        values = np.asarray(extract(images), np.float64)
        if values.ndim != 2 or len(values) != len(images):
            raise InputError(
                f"an extractor must return [{len(images)}, D] features, got {list(values.shape)} of {name}: correct it"
            )
        return Features(values)

    return Extractor(name, "", checked)


def _torch(device: str | None) -> tuple[Any, Any]:
    import torch

    from backends.torch import device as devices

    try:
        return torch, devices.choose(device)
    except InputError:  # a name of JAX's or MLX's
        return torch, devices.choose(None)


def _inception(weights: str | None, device: str | None) -> Extractor:
    torch, place = _torch(device)
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is not of this PyTorch
        why = " ".join(str(error).split())
        raise InputError(
            f"this metric needs torch-fidelity, got '{why:.100}': pip install 'edm2[metrics]', with the torchvision of "
            "the installed PyTorch"
        ) from error
    path = Path(weights) if weights is not None else _downloaded(torch, fidelity.URL_INCEPTION_V3)
    digest = _sha256(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the library's own loading would execute code in it
        parts = ["2048", "logits_unbiased"]
        network = fidelity.FeatureExtractorInceptionV3("inception", parts, str(path)).to(place)
    except Exception as error:  # of unpickling and of loading: many classes
        why = " ".join(str(error).split())
        raise InputError(
            f"--weights must be torch-fidelity's Inception weights, got {path}, '{why:.120}': give another file"
        ) from error
    if not digest.startswith(_INCEPTION_HASH):
        print(
            f"note     {path} is not the Inception of published figures (SHA-256 {digest[:8]}, theirs is "
            f"{_INCEPTION_HASH}): do not compare with these"
        )

    @torch.inference_mode()
    def extract(images: np.ndarray) -> Features:
        values, logits = network(torch.from_numpy(in_colour(images)).to(place))
        return Features(*(part.cpu().numpy().astype(np.float64) for part in (values, logits)))

    return Extractor("inception", digest, extract)


def _dinov2(weights: str | None, device: str | None) -> Extractor:
    torch, place = _torch(device)
    try:
        from transformers import Dinov2Model
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "this metric needs transformers, which is not installed: pip install 'edm2[metrics]'"
        ) from error
    name = weights or _DINOV2
    try:
        network = Dinov2Model.from_pretrained(name, use_safetensors=True, dtype=torch.float32).to(place).eval()
    except Exception as error:  # of the hub, its cache, the network or the file: many classes
        why = " ".join(str(error).split())
        raise InputError(
            f"the network of fd-dinov2 must be a folder or an ID of the hub, got {name}, '{why:.120}': download "
            f"{_DINOV2} (1.2 GB) and give its folder with --weights"
        ) from error
    digest = _hash_of(network)
    mean, std = (torch.tensor(numbers, device=place).reshape(3, 1, 1) for numbers in _IMAGENET)

    @torch.inference_mode()
    def extract(images: np.ndarray) -> Features:
        x = torch.from_numpy(in_colour(images)).to(place, torch.float32)
        size = (_DINOV2_SIDE, _DINOV2_SIDE)
        x = torch.nn.functional.interpolate(x, size=size, mode="bicubic", antialias=True)
        return Features(network((x - mean) / std).pooler_output.cpu().numpy().astype(np.float64))

    return Extractor("dinov2", digest, extract)


def in_colour(images: np.ndarray, /) -> np.ndarray:
    """Grey images as red, green and blue. Raises InputError for other numbers of channels."""
    if images.shape[1] not in (1, 3):
        raise InputError(f"images must be grey or RGB, got {images.shape[1]} channels: measure with an own extractor")
    return np.ascontiguousarray(np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images)


def _downloaded(torch: Any, url: str) -> Path:
    """The file at ``url``, whose name ends in the beginning of its hash, in PyTorch's cache."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_INCEPTION_HASH)
        except Exception as error:  # of the network or the disk: many classes
            raise InputError(
                f"the network of FID must be at {path}, got '{error}' while downloading: fetch {url} (91 MB) and give "
                "it with --weights"
            ) from error
    return path


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"--weights must be a file that can be read, got {path}: {error.strerror}") from error


def _hash_of(network: Any) -> str:
    """SHA-256 of a network's arrays and their names."""
    digest = hashlib.sha256()
    for name, array in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(array.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
