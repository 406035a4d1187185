"""Lines of the log: what training reports every now and then, and what it warns of."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite
from statistics import median

from .evaluation import FIGURES, read_figures
from .folder import Run
from .holdout import HeldOut, Overfitting
from .progress import Progress
from .trackers import Trackers

_BEFORE = 20  # lines that a loss is compared with
_FAR = 10  # times their median distance from their median: of normal numbers, about seven standard deviations


class Report:
    """Each call writes a log line, sends it to ``trackers`` and shows the loss; ``nimg`` is the time of the last call.
    Later lines are dropped at construction."""

    def __init__(
        self, run: Run | None, progress: Progress, nimg: int, held: HeldOut | None, trackers: Trackers
    ) -> None:
        self._held, self._overfitting, self._spikes = held, Overfitting(progress.say), Spikes(progress.say)
        kept = run.truncate_logs(nimg) if run is not None else []
        self._run, self._progress, self._trackers, self.nimg = run, progress, trackers, nimg
        if run is not None:
            figures = [line for line in read_figures(run.path / FIGURES) if line.get("training")]
            trackers.catch_up(run, [line for line in figures if line["nimg"] <= nimg])
        # seconds of training before this start
        self._before = max((line.get("seconds") or 0.0 for line in kept), default=0.0)
        self._start = self._last = time.monotonic()

    def __call__(self, metrics: Mapping[str, float], nimg: int, lr: float, *, skipped: int) -> None:
        """``metrics`` since the last call; ``skipped``: samples of this process, since its start, that could not be
        read."""
        now = time.monotonic()
        record = {
            "nimg": nimg,
            "loss": metrics["loss"],
            "lr": lr,
            "images_per_s": (nimg - self.nimg) / max(now - self._last, 1e-9),
            "seconds": self._before + now - self._start,
            "nonfinite": metrics["nonfinite"],
        }
        if skipped:
            record["skipped"] = skipped
        said = f"loss {metrics['loss']:.4f}"
        if self._held is not None:
            record |= self._held.measure()
            said += f", held out {record['holdout']:.4f}"
        self.nimg, self._last = nimg, time.monotonic()
        if self._run is not None:
            if self._spikes(metrics["loss"], nimg):
                record["spike"] = True
            self._run.append_log(record)
            self._trackers.log(record)
            self._progress.report(said)
            if self._held is not None:
                self._overfitting(record["holdout"], nimg)


class Spikes:
    """Says where a loss lies far above those of the lines before it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._losses = say, deque[float](maxlen=_BEFORE)

    def __call__(self, loss: float, nimg: int) -> bool:
        """Whether it does; a first few lines cannot tell."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _BEFORE or not all(map(isfinite, (*before, loss))):
            return False
        middle = median(before)
        usual = median(abs(other - middle) for other in before)
        if loss <= middle + _FAR * usual or usual == 0:
            return False
        self._say(f"warning: the loss rose to {loss:.4f} at {nimg} images, from about {middle:.4f} before")
        return True
