"""The network that ships with edm2 is what the default run makes, and makes digits."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.svm import SVC

from backends.pipeline.checkpoints.snapshots import load_snapshot
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.job import Job, labels_of_seeds, sample_images
from backends.pipeline.runs.shipped import PATH
from edm2_core.ema import Length
from edm2_core.presets import PRESETS

PRESET = PRESETS["digits"]


def test_it_is_the_average_that_the_default_run_ends_with() -> None:
    shipped = load_snapshot(PATH)
    assert shipped.config == PRESET.network
    assert (shipped.nimg, shipped.length) == (PRESET.hyper.duration, Length.of(0.10))
    assert shipped.data == open_dataset("digits").format


def test_its_digits_are_read_as_their_labels() -> None:
    pytest.importorskip("torch")
    from backends.torch.port import PORT

    data, seeds = open_dataset("digits"), range(100)
    everything = np.arange(len(data))
    reader = SVC(gamma=0.001).fit(data.read(everything).reshape(len(data), -1) * (16 / 255), data.labels(everything))
    job = Job(
        snapshot=load_snapshot(PATH),
        seeds=seeds,
        labels=labels_of_seeds(seeds, load_snapshot(PATH).config),
        solver={"num_steps": 18},
    )
    pictures = sample_images(job, PORT.sampler, batch=100)
    assert (reader.predict(pictures.reshape(100, -1) * (16 / 255)) == job.labels).mean() >= 0.9


def test_the_script_makes_it(tmp_path: Path) -> None:
    """Of a shorter run here: the whole is the default run, which other tests train."""
    pytest.importorskip("torch")
    from examples.shipped_network import Options, main

    main(Options(out=tmp_path / "made.safetensors", duration=1024))
    made = load_snapshot(tmp_path / "made.safetensors")
    assert (made.config, made.nimg, made.length) == (PRESET.network, 1024, Length.of(0.10))
