"""Labels of files: from ``dataset.json``, from WebDataset's ``.cls`` files, or from the names of folders."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from operator import itemgetter
from typing import Any

import numpy as np

from backends.pipeline.checkpoints import checksums
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .files import Files, find

MANIFEST = "dataset.json"
_LOGGER = logging.getLogger("edm2")
MOST_LABELS = 1 << 20  # the longest one-hot row; a larger label is an error
_CHUNK = re.compile(r"\d{5}")  # folders of the official layout, which are no classes


@dataclass(frozen=True)
class Labels:
    """Labels of a dataset. ``values``: class ids, int64 [n] from 0, or vectors, float32 [n, dim]. ``classes``: names of
    the classes, or nothing."""

    values: np.ndarray
    dim: int
    classes: tuple[str, ...] = ()

    @classmethod
    def of_ids(cls, values: np.ndarray, classes: Sequence[str] = ()) -> "Labels":
        """Class ids. Raises InputError where there are fewer names than classes."""
        dim = max(int(values.max()) + 1, len(classes))
        if classes and len(classes) < dim:
            raise InputError(f"classes must be named all, got {len(classes)} names for {dim} classes: add the others")
        return cls(values.astype(np.int64), dim, tuple(classes))


def manifest(labels: Sequence[Sequence[object]] | None, classes: Sequence[str], /) -> bytes:
    """The text of a dataset.json: a name and a label for each file, or None, and the names of the classes, if any. It
    ends with a checksum, by which a changed byte is found."""
    content: dict[str, object] = {"labels": None if labels is None else list(labels)}
    if labels is not None and classes:
        content["classes"] = list(classes)
    return checksums.sealed(json.dumps({**content, checksums.KEY: checksums.BLANK}).encode())


def read_labels(files: Files, indices: Sequence[int], /) -> Labels | None:
    """The labels of the files at ``indices``, in this order, or None.

    ``dataset.json`` at the root decides, ``{"labels": [["cat/1.png", 0], ...]}``, with class ids or vectors; null means
    no labels. Otherwise ``1.cls`` beside each ``1.png`` holds its class id; otherwise files that all lie in one level
    of folders have these as classes, in alphabetical order.

    Raises:
        InputError: labels that are broken, do not name every file, or are of several kinds.
    """
    names = [files.names[i] for i in indices]
    if (index := find(files, MANIFEST)) is not None:
        return _of_manifest(files, index, names)
    if (first := _beside(files, names[0])) is not None:
        return _of_class_files(files, names, first)
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) < 2 or any("/" in folder or not folder or _CHUNK.fullmatch(folder) for folder in folders):
        return None
    classes = sorted(folders)
    ids = {folder: i for i, folder in enumerate(classes)}
    return Labels.of_ids(np.array([ids[name.rpartition("/")[0]] for name in names]), classes)


def _beside(files: Files, name: str) -> int | None:
    return find(files, f"{name.rpartition('.')[0]}.cls")


def _of_class_files(files: Files, names: Sequence[str], first: int) -> Labels:
    values = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        index = first if row == 0 else _beside(files, name)
        text = b"" if index is None else bytes(files.read(index)).strip()
        if not re.fullmatch(rb"\d{1,7}", text):
            got = "none" if index is None else repr(text[:20])
            raise InputError(f"{files.path}/{name} must have its class in a .cls beside it, got {got}: add it")
        values[row] = int(text)
    return Labels.of_ids(values)


def _of_manifest(files: Files, index: int, names: Sequence[str]) -> Labels | None:
    path = files.path / MANIFEST

    def fault(got: str) -> InputError:
        rule = f'{path} must be {{"labels": [["folder/image.png", 3], ...]}} or {{"labels": null}}'
        return InputError(f"{rule}, got {got}: correct the file, or remove it to train without labels")

    text = bytes(files.read(index))
    if not checksums.is_whole(text):
        raise fault(f"another text than was written, by its {checksums.KEY!r}, which may be removed")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise fault(f"'{' '.join(str(error).split())}'") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise fault("no 'labels'")
    pairs, classes = content["labels"], content.get("classes") or ()
    if pairs is None:
        return None
    if not isinstance(pairs, list):
        raise fault(f"{type(pairs).__name__} as labels")
    if not (isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)):
        raise fault(f"{classes!r:.80} as classes")
    if len(pairs) > len(names):
        there = set(names)
        absent = [str(pair[0]) for pair in pairs if isinstance(pair, list) and pair and str(pair[0]) not in there]
        if absent:
            more = f" and {len(absent) - 1} more" * (len(absent) > 1)
            _LOGGER.warning(f"{path} names {absent[0]}{more}, which is not there: it is left out")
    if (ids := _plain_ids(pairs, names)) is not None:
        return Labels.of_ids(ids, classes)
    table: dict[str, Any] = {}
    for pair in pairs:
        match pair:
            case [str(name), label] if _is_label(label):
                if table.setdefault(name, label) != label:
                    raise fault(f"both {table[name]} and {label} for {name}")
            case _:
                raise fault(f"{pair!r:.80}")
    missing = [name for name in names if name not in table]
    if missing:
        raise fault(f"no label for {missing[0]}" + f" and {len(missing) - 1} more files" * (len(missing) > 1))
    labels = [table[name] for name in names]
    if all(isinstance(label, int) for label in labels):
        return Labels.of_ids(np.array(labels, np.int64), classes)
    lengths = {len(label) if isinstance(label, list) else 0 for label in labels}
    if len(lengths) != 1:
        raise fault(f"labels of lengths {', '.join(map(str, sorted(lengths)))} (0: a whole number)")
    return Labels(np.array(labels, np.float32), lengths.pop())


def _plain_ids(pairs: list[Any], names: Sequence[str]) -> np.ndarray | None:
    """The class ids of ``names``, int64, where all pairs are a name and an id and each name is labelled once; None
    otherwise, for whatever reason. It looks at no pair one by one: there may be millions."""
    try:
        if set(map(type, pairs)) != {list} or set(map(len, pairs)) != {2}:
            return None
        named, ids = (list(map(itemgetter(i), pairs)) for i in range(2))
        if set(map(type, named)) != {str} or set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= MOST_LABELS:
            return None
        if named == names:  # as written by the tools: no table is needed
            return np.array(ids, np.int64)
        table = dict(zip(named, ids, strict=True))
        if len(table) != len(pairs):
            return None
        return np.fromiter(map(table.__getitem__, names), np.int64, len(names))
    except (TypeError, ValueError, KeyError):
        return None


def _is_label(label: Any) -> bool:
    if isinstance(label, list):
        return 0 < len(label) <= MOST_LABELS and all(_is_number(value) for value in label)
    return isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MOST_LABELS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
