"""Memory that is freed: kept for what comes next, where the C library lets that be chosen."""

import platform
import subprocess
import sys

import pytest

from backends.pipeline.runs import freed_memory

PAGES = """
import resource
from backends.pipeline.runs import freed_memory
{act}
sizes = (1 << 22, 1 << 24, 1 << 26)  # bytes; glibc maps the last anew each time, whatever came before
def used():
    for size in sizes:
        b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = used()
print((used() - first) * resource.getpagesize())
"""


def freshly_mapped(act):
    """Bytes that the system had to fill with zeros for arrays of sizes that were freed before."""
    done = subprocess.run([sys.executable, "-c", PAGES.format(act=act)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
    assert freshly_mapped("freed_memory.keep()") < 1 << 20
    assert freshly_mapped("pass") > 1 << 25


def test_other_libraries_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    opened = []
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", opened.append)
    freed_memory.keep()
    freed_memory.give_back()
    assert opened == []
