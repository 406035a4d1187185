"""Datasets of Hugging Face saved on disk: Arrow or Parquet files with a column of encoded images, read by pyarrow.

The first column of images is taken, a struct of ``bytes`` and ``path`` or plain bytes, and the column ``label`` of
class ids, or another column of whole numbers if it is the only one. Names of classes come from the ClassLabel feature.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .file_labels import Labels
from .files import unreadable

_LABELS = ("label", "labels", "class", "fine_label")


def is_table(path: Path, /) -> bool:
    """Whether ``path`` is a .parquet or .arrow file, or a folder in which there are only such tables."""
    if path.is_dir():
        return any(_files(path)) and not any(path.glob("*.png"))
    return path.suffix.lower() in (".parquet", ".arrow")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    direct = sorted([*path.glob("*.arrow"), *path.glob("*.parquet")])
    return direct or sorted([*path.glob("data/*.parquet"), *path.glob("train/*.arrow")])


class Rows:
    """The column of images as :class:`~.files.Files`: row k is the file ``k``."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column
        self._images = _table(path).column(column)
        self.names: Sequence[str] = _RowNames(len(self._images))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_column": self._column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["_column"])  # type: ignore[misc]

    def read(self, index: int, /) -> bytes:
        value = self._images[index].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise unreadable(f"{self.path}/{self.names[index]}", f"no bytes in column {self._column}")
        return content


class _RowNames(Sequence[str]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return f"row {index % self._count}"


def open_table(path: Path, /) -> tuple[Rows, Labels | None]:
    """The images and the labels of a table.

    Raises:
        InputError: pyarrow is missing; a damaged file; no column of images; or labels that are no class ids.
    """
    table = _table(path)
    images = [name for name in table.column_names if _is_image(table.schema.field(name).type)]
    if not images or not len(table):
        raise InputError(
            f"a table of data must have a column of encoded images, got {', '.join(table.column_names) or 'none'} in "
            f"{path}: save it with datasets' Image feature"
        )
    return Rows(path, images[0]), _labels(table, path)


def _is_image(kind: Any) -> bool:
    text = str(kind)
    return text in ("binary", "large_binary") or (text.startswith("struct<") and "bytes: binary" in text)


def _labels(table: Any, path: Path) -> Labels | None:
    whole = [name for name in table.column_names if str(table.schema.field(name).type) in ("int64", "int32", "uint8")]
    name = next((name for name in _LABELS if name in whole), whole[0] if len(whole) == 1 else None)
    if name is None:
        return None
    values = table.column(name)
    if values.null_count or (len(values) and int(np.min(values.to_numpy())) < 0):
        raise InputError(f"labels must be class ids from 0 on, got some missing or negative in {path}: remove the rows")
    return Labels.of_ids(values.to_numpy(), _class_names(table.schema.metadata, name))


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    try:
        features = parse_json((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def _table(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise InputError(
            f"tables must be read by pyarrow, got none installed for {path}: pip install pyarrow"
        ) from error
    parts = []
    for file in _files(path):
        try:
            if file.suffix == ".parquet":
                parts.append(pq.read_table(file, memory_map=True))
            else:
                with pa.memory_map(str(file)) as source:
                    parts.append(_arrow(pa, source))
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, error) from error
    if not parts:
        raise InputError(f"a table of data must be .parquet or .arrow files, got none in {path}: check the path")
    try:
        return pa.concat_tables(parts)
    except pa.ArrowException as error:
        raise unreadable(path, f"tables that differ: {error}") from error


def _arrow(pa: Any, source: Any) -> Any:
    """A stream, as ``datasets`` saves, or a file."""
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()
