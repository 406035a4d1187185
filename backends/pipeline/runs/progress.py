"""Progress of a job on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from functools import partial
from shutil import get_terminal_size
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """Counts from ``start`` to ``total``, in ``unit``; silent unless ``shown``.

    On a terminal a bar moves with every :meth:`advance`, and :meth:`report` puts a note beside it. Elsewhere each
    report prints a line.
    """

    def __init__(self, *, total: int, start: int = 0, shown: bool = True, unit: str = "img") -> None:
        self._unit, self._shown = unit, shown
        self._lines = shown and not sys.stderr.isatty()
        self._start, self._done, self._total, self._since = start, start, total, time.monotonic()
        columns, rows = get_terminal_size()  # never 0: tqdm may measure 0 columns, and then draws nothing
        self._bar = tqdm(
            total=total,
            initial=start,
            unit=unit,
            unit_scale=True,
            unit_divisor=1024,
            ncols=columns,
            nrows=rows,
            file=sys.stderr,
            disable=not shown or self._lines,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int, /) -> None:
        self._done += count
        self._bar.update(count)

    def done(self, count: int, /) -> None:
        """:meth:`advance`, then :meth:`report`."""
        self.advance(count)
        self.report()

    def report(self, note: str = "", /) -> None:
        """Show the progress, with ``note``, such as 'loss 0.51'."""
        if self._lines:
            print(f"{self._line()}  {note}".rstrip(), file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(note)

    def say(self, text: str, /) -> None:
        """Print a line on stderr, above the bar, if the progress is shown."""
        if self._shown:
            self._bar.write(text, file=sys.stderr)

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._since, 1e-9)
        rate = (self._done - self._start) / elapsed
        left = tqdm.format_interval((self._total - self._done) / rate) if rate > 0 else "?"
        size, passed = partial(tqdm.format_sizeof, divisor=1024), tqdm.format_interval(elapsed)
        speed, unit = size(rate) if rate >= 1e5 else f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}", self._unit
        return f"{size(self._done)}/{size(self._total)} {unit}  {speed} {unit}/s  {passed} passed  {left} left"
