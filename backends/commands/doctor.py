"""edm2 doctor: what is installed here, whether each port computes rightly, and what to do where it does not.

Exit status 0 where all is well, 1 with a line for each problem.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from backends.pipeline.runs.fitting import free_bytes
from edm2_core import __version__

from .port_check import GROUP

_SECONDS = 120  # for one port; JAX compiles for some of them
_QUICK = {  # for a tiny network, whose compilation takes longer than it
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
}
_DISTRIBUTION = "edm2"
_COLUMNS = ("port", "device", "memory", "bfloat16", "float16", "tf32", "float64", "forward", "step", "seconds")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 doctor``."""

    ports: tuple[str, ...] = ()
    """Ports to check. Without it: all that are registered."""


def run(options: Options) -> int:
    """Print the tables and the problems. Returns the exit status."""
    problems: list[str] = []
    print(f"edm2 {__version__}, {_machine()}")
    rows = [list(_COLUMNS)]
    names = options.ports or _registered(problems)
    with ThreadPoolExecutor() as pool:
        for name, answer in zip(names, pool.map(_check, names), strict=True):
            rows += _rows(name, answer, problems)
    if len(rows) > 1:
        print()
        _print_table(rows)
        print("forward, step: error over tolerance, against the float64 reference; at most 1")
    if not any(len(row) == len(_COLUMNS) for row in rows[1:]):
        problems.append("a port must be installed to train or sample, got none that works: pip install 'edm2[torch]'")
    print()
    _print_table([["extra", "state"], *_extras()])
    print()
    _print_table([["hub", *_hub()]])
    for problem in problems:
        print(f"problem  {problem}")
    print("all is well" if not problems else f"{len(problems)} to mend")
    return 1 if problems else 0


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; a row with fewer cells ends in a text of any length."""
    full = max(map(len, rows))
    widths = [max(len(row[i]) for row in rows if len(row) == full) for i in range(full)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())


def _machine() -> str:
    free = free_bytes()
    memory = "" if free is None else f", {free / 2**30:.1f} GiB of memory free"
    system = f"{platform.system()} {platform.machine()}"
    return f"Python {platform.python_version()}, {system}, {os.cpu_count()} cores{memory}"


# ---- ports


def _registered(problems: list[str]) -> list[str]:
    names = sorted(point.name for point in metadata.entry_points(group=GROUP))
    if not names:
        problems.append("edm2 must be installed for its ports to be found, got none: pip install -e . in its folder")
    return names


def _check(name: str) -> dict[str, Any]:
    """What :mod:`.port_check` says of a port, or how it ended."""
    if name not in {point.name for point in metadata.entry_points(group=GROUP)}:
        return {"problem": "no port of this name is registered", "mend": "correct the name"}
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    settings = _QUICK | {"PYTHONPATH": paths}
    line = [sys.executable, "-m", "backends.commands.port_check", name]
    try:
        done = subprocess.run(line, env=os.environ | settings, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"no answer in {_SECONDS} seconds; a device or its driver may hang"}
    last = done.stdout.splitlines()[-1:]
    if done.returncode or not last:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"problem": f"its process ended with status {done.returncode}: {why:.200}"}
    answer: dict[str, Any] = json.loads(last[0])
    return answer


def _rows(name: str, answer: dict[str, Any], problems: list[str]) -> Iterator[list[str]]:
    """The lines of a port in the table; its ``problems`` are added."""
    if "absent" in answer:
        yield [name, f"not installed: {answer['absent']}"]
    if "problem" in answer:
        yield [name, "fails"]
        mend = answer.get("mend", f"install it anew, pip install 'edm2[{name}]'")
        problems.append(f"port {name} must run, got '{answer['problem']}': {mend}")
    for row in answer.get("rows", ()):
        numbers = {"forward": f"{row['forward']:.2g}", "step": f"{row['step']:.2g}", "seconds": f"{row['seconds']:.1f}"}
        shown = {key: str(value) for key, value in row.items()} | numbers
        yield [shown[column] for column in _COLUMNS]
        for what in ("forward", "step"):
            if not row[what] <= 1:
                problems.append(
                    f"{what} of port {name} must be within its tolerance, got {row[what]:.3g} times it on "
                    f"{row['device']}: update framework and driver, and see python -m conformance --port {name}"
                )


# ---- packages


def _extras() -> Iterator[tuple[str, str]]:
    """Each extra, and what it lacks."""
    try:
        about = metadata.metadata(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield "-", "edm2 is not installed: pip install -e . in its folder"
        return
    needs = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    for extra in about.get_all("Provides-Extra") or ():
        missing = [text for need in _of_extra(extra, needs) if (text := _lack(need))]
        told = f"needs {', '.join(dict.fromkeys(missing))}: pip install 'edm2[{extra}]'" if missing else "installed"
        yield extra, told


def _of_extra(extra: str, needs: Sequence[Requirement]) -> Iterator[Requirement]:
    """The requirements of an extra and of the extras that it names."""
    for need in needs:
        if need.marker is None or not need.marker.evaluate({"extra": extra}) or need.marker.evaluate({"extra": ""}):
            continue
        if need.name == _DISTRIBUTION:
            for inner in sorted(need.extras):
                yield from _of_extra(inner, needs)
        else:
            yield need


def _lack(need: Requirement) -> str:
    """What is wrong with the installed package; nothing, if it fits."""
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return need.name
    fits = need.specifier.contains(version, prereleases=True)
    return "" if fits else f"{need.name}{need.specifier} (here {version})"


def _hub() -> list[str]:
    """The hub's package, the state of the token, never the token itself, and the cache."""
    try:
        from huggingface_hub import __version__ as version
        from huggingface_hub import constants, get_token
    except ImportError:
        return ["no huggingface_hub: pip install 'edm2[hub]'"]
    token = "a token is set" if get_token() else "no token: hf auth login, to publish and for private networks"
    if "HF_TOKEN" in os.environ and get_token():
        token += " by HF_TOKEN"
    cache = Path(constants.HF_HUB_CACHE)
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    return [f"huggingface_hub {version}, {constants.ENDPOINT}{offline}; {token}; cache {cache}"]
