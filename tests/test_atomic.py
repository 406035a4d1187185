"""A file is there whole or not at all, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from backends.pipeline.checkpoints.atomic import write_atomically
from edm2_core.errors import InputError


def _fail_after_some_bytes(error: BaseException) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    return write


def test_a_new_file_gets_its_bytes_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "snapshots" / "file.bin"
    write_atomically(path, lambda file: file.write(b"whole") and None)
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file.bin"]


def test_an_old_file_is_replaced_and_never_seen_half(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    "error", [RuntimeError("fault"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else_and_its_error_comes_through(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_atomically(path, _fail_after_some_bytes(error))
    assert os.listdir(tmp_path) == ["file.bin"]
    assert path.read_bytes() == b"old"


def test_no_space_left_is_one_line_with_the_path_and_the_bytes_free(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(
        InputError, match=r"file\.bin must have room, got 'No space left.*' with \d+ bytes free: "
    ) as caught:
        write_atomically(path, _fail_after_some_bytes(error))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_space_that_runs_out_only_when_the_disk_is_reached_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="must have room"):
        write_atomically(tmp_path / "file.bin", lambda file: file.write(b"x") and None)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_is_one_line_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/inner/file\.bin must be writable, got '.+': choose a folder") as caught:
        write_atomically(tmp_path / "file" / "inner" / "file.bin", lambda file: None)
    assert "\n" not in str(caught.value)


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys\n"
        "from backends.pipeline.checkpoints.atomic import write_atomically\n"
        "def write(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], write)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    left = [name for name in os.listdir(tmp_path) if name != "file.bin"]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "file.bin", lambda file: None)
    assert (tmp_path / "file.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode
