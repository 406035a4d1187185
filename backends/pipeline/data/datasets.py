"""Datasets of any kind: 8-bit images, float arrays, latents, tables of Hugging Face; and the digits in this package.

A dataset hands out what is stored. Its :class:`~edm2_core.codec.Codec` says how that becomes what a network sees.
"""

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, get_args

import numpy as np

from backends.pipeline.checkpoints.remote import is_url, local, url_of
from edm2_core.codec import PIXELS, Codec, DataFormat
from edm2_core.errors import InputError

from . import latents
from .arrays import ArrayFiles, Layout, OneArray, arrays_in
from .file_labels import MANIFEST, Labels, read_labels
from .files import Files, find, is_hidden, open_files
from .images import SUFFIXES, DeepImages, EncodedImages
from .seeds import bits
from .statistics import Items, standardized
from .tables import is_table, open_table

Kind = Literal["images", "arrays", "arrays-chw", "arrays-hwc", "latents", "table"]
"""What data may be; arrays-chw and arrays-hwc are arrays whose channels come first or last, whatever their sizes."""
DIGITS = "digits"
_ONE_ARRAY = (".npy", ".npz", ".safetensors")
_SAMPLES = ("images", "data", "samples", "x")  # names of the samples among several arrays
RULE = (
    "digits, or a folder, .zip or .tar of images or .npy, one .npy, .npz or .safetensors, or .parquet or .arrow files"
)


class Dataset(Protocol):
    """Samples of one shape, each with a label if ``label_dim`` is not 0. Threads may share a dataset.

    ``name`` is short, for folders; ``spec`` is what :func:`open_dataset` opens again, or the name if it cannot.
    ``shape``: channels, height and width as a network sees them. ``format``: codec, that of the condition, and names of
    classes. ``vectors``: labels are vectors of length ``label_dim``, else ids of as many classes. ``cond_channels``: of
    the condition of each sample, 0 for none.
    """

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def format(self) -> DataFormat: ...
    @property
    def label_dim(self) -> int: ...
    @property
    def vectors(self) -> bool: ...
    @property
    def cond_channels(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        """As stored: uint8 or float32 [n, channels, height, width], moments with twice as many channels.

        Raises InputError where a file cannot be read.
        """
        ...

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        """Class ids, int64 [n] from 0 to label_dim - 1, or vectors, float32 [n, label_dim]. Call it only if
        ``label_dim`` is not 0."""
        ...

    def condition(self, indices: np.ndarray, /) -> np.ndarray:
        """The conditions, as stored: [n, cond_channels, height, width]. Call it only if ``cond_channels`` is not 0."""
        ...


@dataclass(frozen=True)
class StoredDataset:
    """A :class:`Dataset` of items and labels."""

    name: str
    spec: str
    items: Items
    format: DataFormat
    given: Labels | None = None
    pair: "StoredDataset | None" = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.items.shape
        return (channels // 2 if self.format.codec.stored == "moments" else channels, height, width)

    @property
    def label_dim(self) -> int:
        return self.given.dim if self.given else 0

    @property
    def vectors(self) -> bool:
        return self.given is not None and self.given.values.ndim == 2

    @property
    def cond_channels(self) -> int:
        return self.pair.shape[0] if self.pair else 0

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        return self.items.read(indices)

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        if self.given is None:
            raise InputError(f"labels must be in {MANIFEST}, {self.spec} has none: train without labels")
        return self.given.values[indices]

    def condition(self, indices: np.ndarray, /) -> np.ndarray:
        if self.pair is None:
            raise InputError(f"conditions must be given with --condition, {self.spec} has none")
        return self.pair.read(indices)


class Subset:
    """The samples of a dataset at ``indices``, int64."""

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices
        self.name, self.spec, self.shape, self.format = dataset.name, dataset.spec, dataset.shape, dataset.format
        self.label_dim, self.vectors = dataset.label_dim, dataset.vectors
        self.cond_channels = dataset.cond_channels

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        return self.dataset.read(self.indices[indices])

    def labels(self, indices: np.ndarray, /) -> np.ndarray:
        return self.dataset.labels(self.indices[indices])

    def condition(self, indices: np.ndarray, /) -> np.ndarray:
        return self.dataset.condition(self.indices[indices])


def open_dataset(
    spec: str | os.PathLike[str],
    /,
    *,
    kind: Kind | None = None,
    condition: str | os.PathLike[str] | None = None,
    format: DataFormat | None = None,
) -> StoredDataset:
    """The dataset called ``digits``, or the one at a path.

    Args:
        spec: ``digits``; a folder, .zip or .tar of images, or of .npy files with a sample each; a .npy, .npz or
            .safetensors file of all samples; a folder with .parquet or .arrow files; or the URL of one. Files are found
            at any depth and ordered by name; hidden ones are skipped.
        kind: what it is; None: recognised by what is in it.
        condition: a dataset of as many samples, in the same order: each is the condition of one.
        format: codecs that were measured before, of a run to resume; None: from a manifest, or measured now.

    Raises:
        InputError: nothing there, samples that are broken or differ from one another, labels that do not fit, values
            that are not finite, or a condition of another number or size.
    """
    codec = format.codec if format else None
    dataset = _open(local(spec), kind, codec) if os.fspath(spec) != DIGITS else digits()
    if is_url(spec):  # of which the local copy may be another one, or elsewhere, next time
        url = url_of(spec)
        dataset = replace(dataset, name=PurePosixPath(url).stem, spec=url)
    if condition is None:
        return dataset
    pair = _open(local(condition), None, format.condition if format else None)
    if (got := (len(pair), *pair.shape[1:])) != (need := (len(dataset), *dataset.shape[1:])):
        raise InputError(
            f"a condition must be as many samples of the same size as the data, {_sizes(need)}, got {_sizes(got)} in "
            f"{condition}: make them alike"
        )
    if pair.format.codec.stored == "moments":
        raise InputError(f"a condition must not be moments of latents, got {condition}: store drawn latents")
    return replace(dataset, pair=pair, format=replace(dataset.format, condition=pair.format.codec))


def digits() -> StoredDataset:
    """The UCI optical digits, 1797 images of 8x8. See DIGITS.md beside this file."""
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images = np.rint(arrays["images"][:, None] * (255 / 16)).astype(np.uint8)
        labels = Labels.of_ids(arrays["labels"], tuple("0123456789"))
    items = InMemory(images, DIGITS)
    return StoredDataset(DIGITS, DIGITS, items, DataFormat(classes=labels.classes), labels)


@dataclass(frozen=True)
class InMemory:
    """Items that are an array, [n, channels, height, width]."""

    array: np.ndarray
    path: str

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.array.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.array)

    def where(self, index: int, /) -> str:
        return f"{self.path}, sample {index}"

    def read(self, indices: np.ndarray, /) -> np.ndarray:
        return self.array[indices]


def held_out(dataset: Dataset, share: float, /, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """``dataset`` without a ``share`` of its samples, drawn with ``seed``, and these; None for a share of 0.

    Raises:
        InputError: either part would be empty.
    """
    if not share:
        return dataset, None
    count = round(len(dataset) * share)
    if not 0 < count < len(dataset):
        raise InputError(
            f"--holdout must leave samples on both sides, got {share} of {len(dataset)}: 0.05 is a twentieth"
        )
    order = np.argsort(bits(seed, "holdout").random_raw(len(dataset)), kind="stable")
    kept, held = np.sort(order[count:]), np.sort(order[:count])
    return Subset(dataset, kept), Subset(dataset, held)


# ---- recognising


def _open(path: Path, kind: Kind | None, codec: Codec | None) -> StoredDataset:
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"--data-format must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not path.exists():
        raise InputError(f"data must be {RULE}, got '{path}', which does not exist: check the path")
    name, spec = path.resolve().name if path.is_dir() else path.stem, str(path.absolute())
    make = partial(StoredDataset, name, spec)
    kind, layout = _layout(kind)
    if path.is_file() and path.suffix.lower() in _ONE_ARRAY:
        if kind not in (None, "arrays"):
            raise InputError(
                f"--data-format {kind} must be files of a sample each, got one array, {path}: leave it out"
            )
        items, labels = _one_array(path, layout)
        if items.pixels:
            return make(items, _named(codec or PIXELS, labels), labels)
        return make(items, _named(codec or standardized(items, path), labels), labels)
    if kind == "table" or (kind is None and is_table(path)):
        rows, labels = open_table(path)
        return make(EncodedImages(rows, range(len(rows.names))), _named(codec or PIXELS, labels), labels)
    if not path.is_dir() and path.suffix.lower() not in (".zip", ".tar"):
        raise InputError(f"data must be {RULE}, got '{path}', which is none of these: check the path")
    files = open_files(path)
    kind, indices = _by_kind(files, kind, path)
    labels = read_labels(files, indices)
    if kind == "images":
        images = EncodedImages(files, indices)
        if images.required.bits == 8:
            return make(images, _named(codec or PIXELS, labels), labels)
        deep = DeepImages(files, indices)
        return make(deep, _named(codec or standardized(deep, path), labels), labels)
    arrays = ArrayFiles(files, indices, layout="chw" if kind == "latents" else layout)
    if kind == "latents":
        return make(arrays, _named(codec or latents.codec_of(files, arrays.shape), labels), labels)
    return make(arrays, _named(codec or standardized(arrays, path), labels), labels)


def _named(codec: Codec, labels: Labels | None) -> DataFormat:
    return DataFormat(codec=codec, classes=labels.classes if labels else ())


def _by_kind(files: Files, kind: Kind | None, path: Path) -> tuple[Kind, Sequence[int]]:
    """What ``files`` hold, and the indices of the samples."""
    suffixes = {"images": SUFFIXES, "arrays": (".npy",), "latents": (".npy",)}
    by_kind: dict[Kind, array[int]] = {"images": array("q"), "arrays": array("q")}  # of millions, a list is large
    overview = "grid.png" if find(files, "samples.json") is not None else None  # of a folder that sampling wrote
    for index, name in enumerate(files.names):
        lower = name.lower()
        each: Kind | None = "images" if lower.endswith(SUFFIXES) else "arrays" if lower.endswith(".npy") else None
        if each is not None and not is_hidden(name) and name != overview:
            by_kind[each].append(index)
    if kind is None and all(by_kind.values()):
        raise InputError(
            f"data must be of one kind, got {len(by_kind['images'])} images and {len(by_kind['arrays'])} .npy in "
            f"{path}: give --data-format images or arrays"
        )
    if kind is None:
        kind = "images" if by_kind["images"] or not by_kind["arrays"] else "arrays"
        if kind == "arrays" and latents.are_latents(files, by_kind["arrays"]):
            kind = "latents"
    indices = by_kind["images" if kind == "images" else "arrays"]
    if not indices:
        others = Counter(Path(name).suffix.lower() or "no ending" for name in files.names if not is_hidden(name))
        seen = f": it has {', '.join(f'{n} {suffix}' for suffix, n in others.most_common(3))}" if others else ""
        raise InputError(
            f"data must hold {kind} ({' '.join(suffixes[kind])}), got none in {path}: check the path{seen}"
        )
    return kind, indices


def _layout(kind: Kind | None) -> tuple[Kind | None, Layout | None]:
    """The kind of data, and of arrays the layout that was asked for."""
    if kind == "arrays-chw":
        return "arrays", "chw"
    return ("arrays", "hwc") if kind == "arrays-hwc" else (kind, None)


def _one_array(path: Path, layout: Layout | None) -> tuple[OneArray, Labels | None]:
    arrays = arrays_in(path)
    part = next((name for name in ("", *_SAMPLES) if name in arrays), None)
    samples = [name for name, array in arrays.items() if array.ndim in (3, 4)]
    if part is None:
        if len(samples) != 1:
            raise InputError(
                f"data in several arrays must be called images, beside labels, got {', '.join(arrays) or 'none'} in "
                f"{path}: rename them"
            )
        part = samples[0]
    beside = path.with_name(f"{path.stem}-labels.npy")
    labels = arrays.get("labels")
    if labels is None and path.suffix.lower() == ".npy" and beside.exists():
        labels = arrays_in(beside)[""]
    items = OneArray(arrays[part], path, part, layout)
    return items, None if labels is None else _array_labels(labels, len(items), path)


def _array_labels(values: np.ndarray, count: int, path: Path) -> Labels:
    whole = values.dtype.kind in "iu"
    if (
        len(values) != count
        or values.ndim not in (1, 2)
        or (values.ndim == 1) != whole
        or not np.isfinite(values).all()
    ):
        raise InputError(
            f"labels must be {count} whole numbers [N] or vectors [N, label_dim] of finite floats, got {values.dtype} "
            f"{list(values.shape)} of {path}: correct them"
        )
    if whole and values.min() < 0:
        raise InputError(f"labels must be whole numbers from 0 on, got {values.min()} of {path}: correct them")
    return Labels.of_ids(values) if whole else Labels(values.astype(np.float32), values.shape[1])


def _sizes(count_height_width: tuple[int, ...]) -> str:
    count, height, width = count_height_width
    return f"{count} of {width}x{height}"
