"""Files at URLs, by fsspec: s3://, gs://, abfs:// and whatever else it knows; hf:// by the hub's own package.

What is read is copied to ~/.cache/edm2/remote first, once: all readers here read parts of files, in any order.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import xxhash

from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from . import hub
from .atomic import write_bytes

CACHE = Path.home() / ".cache" / "edm2"
_URL = re.compile(r"([a-z][a-z0-9+.-]+):(?:/+|$)")  # one slash or two: Path makes one of two, and none at the end
_COPIED = ".copied.json"  # what was copied, by name
# what file systems say of a file's version
_VERSION = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "modify", "updated", "created")


def is_url(path: str | os.PathLike[str], /) -> bool:
    """Whether ``path`` is the URL of a remote file or folder, perhaps one that was a Path in between."""
    return _URL.match(os.fspath(path)) is not None


def url_of(path: str | os.PathLike[str], /) -> str:
    """The URL, with the slashes that a Path has lost: two, or three where there are no hosts."""
    text = os.fspath(path)
    return _URL.sub(r"\1:///" if text.startswith(("file:", "local:")) else r"\1://", text, count=1)


def local(path: str | os.PathLike[str], /) -> Path:
    """``path``, or the local copy of what is at a URL. What has not changed since it was copied is not copied again.

    Raises:
        InputError: nothing is there, it cannot be read, or a package is missing.
    """
    if not is_url(path):
        return Path(path)
    url = url_of(path)
    if url.startswith(hub.SCHEME):
        return hub.Address.of(url).local(instead="give a local path")
    folder = CACHE / "remote" / name_of(url)
    with errors_of(url):
        return fetch(url, folder)


def name_of(url: str, /) -> str:
    """The name of a local folder for ``url``: readable, and another for each."""
    last = PurePosixPath(url.rstrip("/")).name or "root"
    return f"{re.sub('[^A-Za-z0-9._-]', '_', last)}-{xxhash.xxh3_64_hexdigest(url.rstrip('/').encode())[:8]}"


def open_system(url: str, /) -> tuple[Any, str]:
    """The file system of fsspec that ``url`` is in, and the path there."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    return system, str(path)


@contextmanager
def errors_of(url: str, /) -> Iterator[None]:
    """Within it, errors of a file system, of many classes, become one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{url} must be a file or folder, got nothing there: correct the address") from error
    except ImportError as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"{url} must be in a file system whose package is installed, got '{why}': install that package by pip"
        ) from error
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if why.startswith("Protocol not known"):
            raise InputError(
                f"{url} must begin with a scheme of fsspec, such as s3://, got '{why}': correct it"
            ) from error
        raise InputError(f"{url} must be readable and writable, got '{why:.160}': see whether it answers") from error


def fetch(url: str, folder: Path, /) -> Path:
    """Make ``folder`` hold what is at ``url``, and nothing else but hidden files. Returns the copy: that of a file is a
    file in ``folder``. A file appears whole.

    Raises:
        InputError: a name that would lie outside of the folder. Errors of the file system pass.
    """
    system, root = open_system(url)
    found = found_at(system, root)
    if not found:
        raise FileNotFoundError(url)
    whole = list(found) == [""]
    names = {name or PurePosixPath(root).name: (name, version) for name, version in found.items()}
    copied = _copied(folder)
    for name, (remote, version) in names.items():
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"names of files must lie in their folder, got {name!r} in {url}: it is not read")
        if copied.get(name) == version and target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
        try:
            system.get_file(f"{root}/{remote}" if remote else root, str(temporary))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in names and not path.name.startswith("."):
            path.unlink()
    versions = {name: version for name, (_, version) in names.items()}
    write_bytes(folder / _COPIED, json.dumps(versions).encode())
    return folder / next(iter(names)) if whole else folder


def found_at(system: Any, root: str, /) -> dict[str, str]:
    """The files at ``root``, by their names below it ("" for that of a file), and what tells their versions apart."""
    found = system.find(root, detail=True)
    prefix = f"{root.rstrip('/')}/"
    return {
        "" if name.rstrip("/") == root.rstrip("/") else name.removeprefix(prefix): _version(info)
        for name, info in sorted(found.items())
        if info.get("type") != "directory"
    }


def _version(info: dict[str, Any]) -> str:
    return " ".join(str(info[key]) for key in _VERSION if key in info)


def _copied(folder: Path) -> dict[str, str]:
    try:
        return dict(parse_json((folder / _COPIED).read_text()))
    except (OSError, ValueError, TypeError):
        return {}
