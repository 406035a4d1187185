"""The picture at the end of a run: what it is measured on, how long it may take, and what an interrupt loses."""

import numpy as np
import pytest
from toy_port import PROG, ToySampler, run_toy
from toy_port import train_toy as train

from backends.pipeline.runs.folder import Run
from backends.pipeline.runs.length_picture import _affordable, _drawn

pytestmark = pytest.mark.usefixtures("toy")


class Interrupted(ToySampler):
    """Is interrupted at the second network."""

    def __call__(self, *network, **options):
        if self.calls:
            raise KeyboardInterrupt
        return super().__call__(*network, **options)


def test_an_interrupted_picture_loses_nothing_and_is_drawn_by_the_same_command(capsys):
    status, _, run = train(duration=1024, sampler=Interrupted())
    assert status == 130
    assert f"the run is complete and stored; to draw the picture: {PROG} --outdir run" in capsys.readouterr().out
    assert run.state_nimg() == 1024
    assert not (run.samples_path / "lengths.png").exists()
    assert run_toy(None, ToySampler(), prog=PROG, outdir="run") == 0
    assert (run.samples_path / "lengths.png").exists()


def test_the_picture_can_be_left_out():
    sampler = ToySampler()
    _, _, run = train(duration=1024, sampler=sampler, no_picture=True)
    assert not sampler.calls
    assert not run.samples_path.exists()


def test_the_error_is_measured_on_images_from_all_over_the_data_and_says_so(capsys):
    train(duration=1024, seed=3)
    assert "on 512 of 1797 training images at sigma 0.67, drawn with seed 3" in capsys.readouterr().out
    chosen = _drawn(1797, 512, seed=3)
    assert len(set(chosen)) == 512
    thirds = np.bincount(chosen // 599)  # a third of the names each, to 6 standard deviations
    assert np.abs(thirds - 512 / 3).max() < 6 * (512 * (1 / 3) * (2 / 3)) ** 0.5


def test_a_slow_run_has_a_smaller_picture():
    run = Run("slow")
    run.path.mkdir()
    run.append_log({"nimg": 1000, "seconds": 1000.0})
    columns, count = _affordable(run, 7)
    assert 7 * (columns * 63 + count) / 3 <= 60 or (columns, count) == (2, 32)
    run.append_log({"nimg": 2000, "seconds": 1000.1})
    run.append_log({"nimg": 10**8, "seconds": 10**5})
    assert _affordable(run, 7) == (10, 512)
