"""The files of a run folder.

config.json      the config                    snapshots/   stored averages
log.jsonl        a line every --status images  state/       the states to resume from
telemetry.jsonl  a line per measured step      samples/     pictures
"""

import json
import logging
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from backends.pipeline.checkpoints import checksums
from backends.pipeline.checkpoints.atomic import write_bytes, write_error
from backends.pipeline.checkpoints.described import Undescribed
from backends.pipeline.checkpoints.remote import name_of
from backends.pipeline.checkpoints.sources import Source, open_sources
from backends.pipeline.checkpoints.states import newest as newest_state
from backends.pipeline.checkpoints.states import read_counters
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json
from edm2_core.network import NetworkConfig

from .config import TrainConfig

RUNS = Path("runs")
_LOGGER = logging.getLogger("edm2")


def create(outdir: Path | None, data_name: str) -> Path:
    """Make ``outdir``, or a fresh numbered folder such as ``runs/00003-digits``, and return it.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        if outdir is not None:
            outdir.mkdir(parents=True, exist_ok=True)
            return outdir
        while True:
            numbers = [int(path.name[:5]) for path in RUNS.glob("*") if re.match(r"\d{5}-", path.name)]
            path = RUNS / f"{max(numbers, default=-1) + 1:05d}-{data_name}"
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:  # another process made it first
                continue
    except OSError as error:
        raise write_error(outdir or RUNS, error) from error


def any_run() -> bool:
    """Whether there is a run under ``runs/``."""
    return any(RUNS.glob("*/config.json"))


def newest(*, train: str) -> Path:
    """The run under ``runs/`` that was last started or resumed; ``train`` is the command to suggest.

    Raises:
        InputError: there is none.
    """
    configs = sorted(RUNS.glob("*/config.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not configs:
        raise InputError(
            f"a run must exist under {RUNS}/, got none in {Path.cwd()}: train one with {train}, or give one with --run"
        )
    return configs[-1].parent


def is_run(path: Path, /) -> bool:
    """Whether the folder has a run's config.json, perhaps a damaged one; that of a single network says "edm2"."""
    config = Run(path).config_path
    if not config.is_file():
        return False
    try:
        values = parse_json(config.read_bytes())
    except (OSError, ValueError):
        return True
    return not isinstance(values, dict) or isinstance(values.get("format", 0), int)


class Run:
    """The files of one run folder. Making a ``Run`` touches nothing."""

    def __init__(self, path: str | Path, /) -> None:
        self.path = Path(path)
        self.url: str | None = None
        """Where its files are copied to, or were copied from."""
        self.config_path = self.path / "config.json"
        self.log_path = self.path / "log.jsonl"
        self.telemetry_path = self.path / "telemetry.jsonl"
        self.states_path = self.path / "state"
        self.snapshots_path = self.path / "snapshots"
        self.samples_path = self.path / "samples"

    @property
    def address(self) -> str:
        """What a command is given to find it."""
        return self.url or str(self.path)

    @property
    def notes_path(self) -> Path:
        """Where what is measured of it is written: into it, or, as a copy of what is elsewhere is not, beside."""
        return self.path if self.url is None else Path("measured") / name_of(self.url)

    @property
    def state_path(self) -> Path | None:
        """The last state that is complete; None if there is none."""
        return newest_state(self.states_path)

    def exists(self) -> bool:
        """Whether the folder holds a run. Raises InputError if it holds only parts of one, or is a file."""
        if self.config_path.is_file():
            return True
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"a run must be a folder, got the file {self.path}: choose another --outdir")
        if self.snapshots_path.exists() or self.state_path is not None:
            raise InputError(
                f"a run must have its config.json, got none in {self.path}: restore it, or choose another --outdir"
            )
        return False

    def config(self) -> TrainConfig:
        """The config in config.json. Raises InputError if it is missing or damaged."""
        try:
            text = self.config_path.read_text()
        except OSError as error:
            raise InputError(
                f"a run must be a folder with a config.json, got {self.path}: choose one under runs/"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.config_path} must be text, got other bytes: restore the file") from error
        return TrainConfig.from_json(text, name=str(self.config_path))

    def save_config(self, config: TrainConfig, /) -> None:
        write_bytes(self.config_path, config.to_json().encode())

    def state_nimg(self) -> int:
        """Images seen by the stored state; 0 if none is stored yet. Raises InputError if it is damaged."""
        return read_counters(path)[0] if (path := self.state_path) is not None else 0

    def snapshots(self, network: NetworkConfig, /) -> list[Source]:
        """Open the stored averages, sorted by time, then by length. ``network`` is that of the run's config.

        Raises:
            InputError: a snapshot is damaged or of another network.
        """
        paths = sorted(self.snapshots_path.glob("*.safetensors"))
        try:
            sources = open_sources(paths) if paths else []
        except Undescribed as error:  # raw weights
            raise _foreign(error.path) from error
        for source in sources:
            if source.config != network:
                raise _foreign(source.path)
        return sources

    def append_log(self, record: dict[str, Any], /) -> None:
        """Add a line to log.jsonl; non-finite numbers become null."""
        _append(self.log_path, record)

    def append_telemetry(self, record: dict[str, Any], /) -> None:
        """Add a line to telemetry.jsonl; non-finite numbers become null."""
        _append(self.telemetry_path, record)

    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl, without a last line that a killed run left incomplete, and without damaged ones."""
        return [
            line
            for line in _records(self.log_path)
            if all(line.get(key) is None or _is_number(line[key]) for key in ("seconds", "loss"))
        ]

    def telemetry(self) -> Iterator[dict[str, Any]]:
        """Iterate over the lines of telemetry.jsonl, see :func:`~.telemetry.record`, without an incomplete last one.
        A list of those of a long run would take much more memory than the file."""
        return _records(self.telemetry_path)

    def truncate_logs(self, nimg: int, /) -> list[dict[str, Any]]:
        """Drop the lines that a run resumed at ``nimg`` images writes again. Returns those of log.jsonl that remain."""
        kept = [record for record in self.log() if record["nimg"] <= nimg]
        measured = [record for record in self.telemetry() if record["nimg"] < nimg]  # nimg before the step
        for path, records in ((self.log_path, kept), (self.telemetry_path, measured)):
            if path.exists():
                write_bytes(path, "".join(map(_line, records)).encode())
        return kept


def _foreign(path: Path) -> InputError:
    return InputError(f"snapshots of a run must be averages of its network, got {path}: move it elsewhere")


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_line(_finite(record)))
    except OSError as error:
        raise write_error(path, error) from error


def _line(record: dict[str, Any]) -> str:
    """With a checksum, by which a changed byte is found."""
    return checksums.sealed(json.dumps({**record, checksums.KEY: checksums.BLANK}).encode()).decode() + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    sealed = False  # of a run that an earlier version began, the first lines are not
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse_json(line)
                whole = checksums.is_whole(line.rstrip("\n").encode()) and (checksums.KEY in record or not sealed)
                sealed = sealed or checksums.KEY in record
            except (TypeError, ValueError):
                whole = False
            if whole and isinstance(record, dict) and isinstance(record.get("nimg"), int):
                record.pop(checksums.KEY, None)
                yield record
            elif line.endswith("\n"):  # not one that was being written
                _LOGGER.warning(f"line {number} of {path} is damaged, and is passed over")
