"""Experiment trackers, chosen by ``--log``: TensorBoard, Weights & Biases, MLflow and Trackio show what a run writes.

The files of the run stay the truth. ``trackers.json`` beside them says which record of each tracker is the run's, and
up to how many images each kind of line was sent. So no line is sent twice, a resumed run goes on in the same record,
and what a tracker lacks, because it failed or was not chosen yet, is sent when the run is resumed.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from heapq import merge
from importlib.util import find_spec
from itertools import groupby
from math import isfinite
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, Self
from uuid import uuid4

from PIL import Image

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.checksums import KEY
from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .config import TrainConfig
from .folder import Run

Scalars = dict[str, float]
Line = Mapping[str, Any]
PROJECT = "edm2"
_FILE, _FOLDER = "trackers.json", "tensorboard"
_LOGGER = logging.getLogger("edm2")


class Tracker(Protocol):
    """A record of one library, open for writing. Steps are images seen; ``where`` says how to look at the record."""

    where: str

    def scalars(self, step: int, values: Scalars, /) -> None: ...
    def picture(self, step: int, name: str, path: Path, /) -> None: ...
    def close(self) -> None: ...


Known = dict[str, Any]
"""What is stored of a record: empty of a new one. A tracker adds what finds its record again."""


class TensorBoard:
    """Event files in the run folder. A resumed run adds a file."""

    def __init__(self, run: Run, config: Mapping[str, Any], known: Known) -> None:
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        self._writer = EventFileWriter(str(run.path / _FOLDER))
        self.where = f"tensorboard --logdir {run.path.parent}"
        if "id" not in known:
            known["id"] = _FOLDER
            text = "".join(f"    {line}\n" for line in json.dumps(config, indent=2).splitlines())  # Markdown: as it is
            metadata = create_summary_metadata("config", None)
            self._add(0, [{"tag": "config", "metadata": metadata, "tensor": make_tensor_proto([text])}])

    def scalars(self, step: int, values: Scalars, /) -> None:
        self._add(step, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def picture(self, step: int, name: str, path: Path, /) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(width=width, height=height, encoded_image_string=path.read_bytes())
        self._add(step, [{"tag": name, "image": image}])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: Iterable[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


class WandB:
    """A run of the project edm2, or WANDB_PROJECT. WANDB_MODE=offline writes to the run folder alone."""

    def __init__(self, run: Run, config: Mapping[str, Any], known: Known) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.name,
            id=known.get("id"),
            resume="allow",
            dir=run.path.absolute(),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        known["id"] = self._run.id
        folder = Path(self._run.dir).parent
        self.where = f"offline; wandb sync {folder}" if self._run.offline else str(self._run.url or folder)

    def scalars(self, step: int, values: Scalars, /) -> None:
        self._run.log(values, step=max(step, self._run.step))  # it drops what comes at an earlier step

    def picture(self, step: int, name: str, path: Path, /) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=max(step, self._run.step))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment edm2, or MLFLOW_EXPERIMENT_NAME, in MLFLOW_TRACKING_URI or MLflow's local store."""

    def __init__(self, run: Run, config: Mapping[str, Any], known: Known) -> None:
        # a server that does not answer would hold training for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        # the default is of the folder that the command runs in, which may be another when it is resumed
        uri = os.environ.get("MLFLOW_TRACKING_URI") or known.get("uri") or mlflow.get_tracking_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        if "id" in known:
            self._client.update_run(known["id"], status="RUNNING")
        else:
            known |= {"id": self._created(run.path.name, config), "uri": uri}
        self._id: str = known["id"]
        self.where = f"{uri}, run {self._id}"

    def _created(self, name: str, config: Mapping[str, Any]) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        of = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        made: str = self._client.create_run(of, run_name=name).info.run_id
        for key, value in _flat(config):
            self._client.log_param(made, key, value)
        return made

    def scalars(self, step: int, values: Scalars, /) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        allowed = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in allowed.items()])

    def picture(self, step: int, name: str, path: Path, /) -> None:
        with Image.open(path) as picture:
            self._client.log_image(self._id, picture, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of the project edm2 in TRACKIO_DIR, or in TRACKIO_SPACE_ID. It is found by its name, which is unique."""

    def __init__(self, run: Run, config: Mapping[str, Any], known: Known) -> None:
        import trackio

        new = "id" not in known
        known.setdefault("id", f"{run.path.name}-{uuid4().hex[:6]}")
        with redirect_stdout(None):
            self._run = trackio.init(
                PROJECT, known["id"], config=dict(config), resume="never" if new else "must", embed=False
            )
        self.where = f"trackio show --project {PROJECT}, run {known['id']}"

    def scalars(self, step: int, values: Scalars, /) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path, /) -> None:
        import trackio

        self._run.log({name: trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        import trackio

        with redirect_stdout(None):
            trackio.finish()


OPENED: dict[str, Callable[[Run, Mapping[str, Any], Known], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""By name, which is also that of the package."""


def check_installed(names: Iterable[str], /) -> None:
    """Raises InputError if a tracker of these names is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, such as W&B leaves, is no package
            raise InputError(f"--log {name} needs {name}, which is not installed: pip install 'edm2[trackers]'")


class Trackers:
    """The trackers of a run, none by default; a context manager, which closes them.

    A tracker that fails is left out, which is said in a line, and training goes on.
    """

    def __init__(self, names: Sequence[str] = (), run: Run | None = None, config: TrainConfig | None = None) -> None:
        """Open the record of each of ``names``. Raises InputError if trackers.json is damaged."""
        self._opened: dict[str, Tracker] = {}
        self._batch = 0 if config is None else config.hyper.batch
        if not names or run is None or config is None:
            return
        self._path = run.path / _FILE
        self._stored = _read(self._path)
        values = {key: value for key, value in parse_json(config.to_json()).items() if key != KEY}
        for name in dict.fromkeys(names):
            with self._told(name):
                stored = self._stored.get(name) or {"record": {}, "sent": {}}
                tracker = OPENED[name](run, values, stored["record"])
                self._opened[name], self._stored[name] = tracker, stored
                self._save()
                print(f"log      {name}: {tracker.where}")
        sys.stdout.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for name in list(self._opened):
            with self._told(name):
                self._opened[name].close()

    def catch_up(self, run: Run, figures: Iterable[Line], /) -> None:
        """Send what the files of a run that is resumed hold, and ``figures`` of its averages, where a tracker lacks
        it."""
        if not self._opened:
            return
        logged = ((line["nimg"], partial(self.log, line)) for line in run.log())
        measured = ((line["nimg"] + self._batch, partial(self.telemetry, line)) for line in run.telemetry())
        scored = ((at, partial(self.figures, list(lines))) for at, lines in groupby(figures, itemgetter("nimg")))
        for _, send in merge(logged, measured, scored, key=itemgetter(0)):  # some trackers need steps in order
            send()

    def log(self, line: Line, /) -> None:
        """A line of log.jsonl."""
        self._scalars("log", line["nimg"], lambda: of_log(line))

    def telemetry(self, line: Line, /) -> None:
        """A line of telemetry.jsonl, whose time is before its step: it is sent with the time after it."""
        self._scalars("telemetry", line["nimg"] + self._batch, lambda: of_telemetry(line))

    def figures(self, lines: Sequence[Line], /) -> None:
        """All lines of figures.jsonl of one time."""
        self._scalars("figures", lines[0]["nimg"], lambda: of_figures(lines))

    def picture(self, step: int, name: str, path: Path, /) -> None:
        """A picture that the run has drawn."""
        self._send(f"picture {name}", step, lambda tracker: tracker.picture(step, name, path))

    def _scalars(self, kind: str, step: int, values: Callable[[], Scalars]) -> None:
        self._send(kind, step, lambda tracker: tracker.scalars(step, values()))

    def _send(self, kind: str, step: int, call: Callable[[Tracker], None]) -> None:
        """Call for each tracker that was sent nothing of this kind at this step, or later."""
        for name in list(self._opened):
            sent = self._stored[name]["sent"]
            if step <= sent.get(kind, -1):
                continue
            with self._told(name):
                call(self._opened[name])
                sent[kind] = step
                self._save()

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Within it, an error is said, and leaves the tracker out."""
        try:
            yield
        except Exception as error:
            self._opened.pop(name, None)
            why = " ".join(str(error).split()) or type(error).__name__
            _LOGGER.warning(f"{name} is left out from here on, got '{why:.160}': training and log.jsonl go on")

    def _save(self) -> None:
        write_bytes(self._path, (json.dumps(self._stored, indent=2) + "\n").encode())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        stored = parse_json(path.read_text(encoding="utf-8"))
        if all({"record", "sent"} <= one.keys() for one in stored.values()):
            return dict(stored)
    except (AttributeError, OSError, TypeError, ValueError):
        pass
    raise InputError(f"{path} must be as it was written, got other text: remove it, and trackers begin new records")


# ---- lines of files as numbers by name; those that are not finite are left out


def of_log(line: Line, /) -> Scalars:
    """All numbers of a line of log.jsonl, by their names there; held-out losses by noise level."""
    levels = zip(line.get("holdout_sigma") or (), line.get("holdout_by_sigma") or (), strict=False)
    by_level = {f"holdout/sigma {sigma:.3g}": loss for sigma, loss in levels}
    return _finite({key: value for key, value in line.items() if key != "nimg"} | by_level)


def of_telemetry(line: Line, /) -> Scalars:
    """Magnitudes by resolution of encoder and decoder, of its blocks the largest maximum and the mean of the rest, as
    in the report; losses by noise level."""
    places: dict[str, list[Line]] = {}
    for block in line["blocks"].values():
        height, width = block["size"]
        places.setdefault(f"{block['role'].capitalize()} {height}x{width}", []).append(block)
    values: dict[str, Any] = {}
    for place, blocks in places.items():
        for column in blocks[0].keys() - {"role", "size"}:
            known = list(_finite({str(i): block[column] for i, block in enumerate(blocks)}).values())
            if known:
                values[f"{column}/{place}"] = max(known) if column.endswith("max") else fmean(known)
    noise = line["noise"]
    values |= {
        f"loss by noise/sigma {sigma:.3g}": loss for sigma, loss in zip(noise["sigma"], noise["loss"], strict=True)
    }
    return _finite(values)


def of_figures(lines: Iterable[Line], /) -> Scalars:
    """Figures by their name and the length of the average."""
    return _finite({f"{name}/{line['length']}": value for line in lines for name, value in line["figures"].items()})


def _finite(values: Mapping[str, Any]) -> Scalars:
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float) and isfinite(value)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings, by their path: network.model_channels."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
