"""Which averages are stored when, as the config's interval or its snapshot plan says."""

from functools import partial

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot, snapshot_name
from backends.trainer import Trainer
from edm2_core.ema import Length
from edm2_core.network import plan

from .config import TrainConfig
from .folder import Run


def crossed(interval: int | None, before: int, now: int, /) -> bool:
    """Whether a multiple of ``interval``, where there is one, lies after ``before`` and not after ``now``."""
    return interval is not None and before // interval < now // interval


class DueSnapshots:
    """Stores averages when they are due, and deletes those that the snapshot plan no longer keeps."""

    def __init__(self, config: TrainConfig, run: Run | None) -> None:
        self._config, self._run, self._plan = config, run, config.snapshot_plan
        sources = run.snapshots(config.network) if run is not None and self._plan is not None else []
        self._stored = {source.path: (source.time, source.length.value) for source in sources}

    def store_due(self, trainer: Trainer, before: int, now: int, *, end: bool) -> None:
        for length in self._due(before, now, end=end):
            names = plan(self._config.network).parameters
            average = trainer.for_first(partial(trainer.average, length), names)
            if self._run is not None:
                config = self._config
                snapshot = Snapshot(params=average, config=config.network, nimg=now, length=length, data=config.format)
                path = self._run.snapshots_path / snapshot_name(now, length)
                save_snapshot(path, snapshot, dtype=config.snapshot_dtype)
                self._stored[path] = (now, length.value)  # names count thousands of images: one may come again
        if self._run is not None and self._plan is not None:
            stale = set(self._plan.stale(self._stored.values()))
            for path in [path for path, stored in self._stored.items() if stored in stale]:
                path.unlink(missing_ok=True)
                del self._stored[path]

    def store_missing(self, trainer: Trainer) -> None:
        """Store what was due after the last step, if the run ended between that step and the end of the write."""
        before, now = trainer.nimg - self._config.hyper.batch, trainer.nimg
        if not now:
            return
        names = [snapshot_name(now, length) for length in self._due(before, now, end=False)]

        def missing() -> bytes:
            folder = None if self._run is None else self._run.snapshots_path
            return b"" if folder is None or all((folder / name).exists() for name in names) else b"1"

        if trainer.team.first(missing):
            self.store_due(trainer, before, now, end=False)

    def _due(self, before: int, now: int, *, end: bool) -> tuple[Length, ...]:
        if self._plan is not None:
            return tuple(map(Length.of, self._plan.due(before, now, end=end)))
        hyper = self._config.hyper
        return hyper.lengths if end or crossed(hyper.snapshot, before, now) else ()
