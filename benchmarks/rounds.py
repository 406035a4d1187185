"""Candidates timed in turns, and the table of what was measured, which is kept after every case."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

Run = Callable[[], object]


def in_turns(
    candidates: Mapping[str, Run],
    *,
    rounds: int,
    settle: Run = lambda: None,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate over ``rounds``, by ``clock``, after ``warm`` calls that do not count.

    The candidates alternate, so that other work on the machine slows all; ``settle`` waits for the device.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(warm + rounds):
        for name, run in candidates.items():
            settle()
            start = clock()
            run()
            settle()
            if index >= warm:
                times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


@dataclass
class Row:
    """One case: seconds by candidate, the first of which is ours; other figures by name, in words."""

    case: str
    seconds: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times as long as ours the second candidate takes."""
        ours, *others = self.seconds.values()
        return others[0] / ours if others else None


@dataclass
class Table:
    """Rows of measurements under a heading, written to ``path``.json and ``path``.md as each is added."""

    path: Path
    heading: str
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {"heading": self.heading, "rows": [asdict(row) for row in self.rows]}
        self.path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(f"{self.heading}\n\n{self.markdown()}\n")
        print(_cells(row), flush=True)

    def markdown(self) -> str:
        lines = ["| case | ours | beside | times as fast | |", "|---|---|---|---|---|"]
        return "\n".join([*lines, *map(_cells, self.rows)])


def _cells(row: Row) -> str:
    ours, *others = row.seconds.items()
    beside = "; ".join(f"{name} {_time(seconds)}" for name, seconds in others)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    notes = "; ".join(f"{name} {text}" for name, text in row.notes.items())
    return f"| {row.case} | {_time(ours[1])} | {beside} | {ratio} | {notes} |"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
