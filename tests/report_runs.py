"""Runs for tests of the report, with telemetry as a run writes it."""

import json

import pytest
from toy_port import PRESET, ToySampler, ToyTrainer, run_toy

from backends.commands.cli import main
from backends.pipeline.runs.folder import Run
from edm2_core.presets import PRESETS

BLOCKS = {"unet.enc.8x8_block0": ("enc", 8), "unet.enc.4x4_block0": ("enc", 4), "unet.dec.8x8_block0": ("dec", 8)}
COLUMNS = [f"{kind}_{part}" for kind in ("activation", "weight", "gradient") for part in ("max", "mean")] + ["update"]


def measurement(nimg, *, value=1.0, u=0.5, blocks=BLOCKS):
    return {
        "nimg": nimg,
        "blocks": {
            name: {"role": role, "size": [resolution, resolution], **dict.fromkeys(COLUMNS, value)}
            for name, (role, resolution) in blocks.items()
        },
        "noise": {"sigma": [0.1, 1.0, 10.0], "loss": [value, 0.5, None], "u": [u, u, None], "count": [3, 4, 0]},
    }


def train(path):
    """A run of the loop with a port that is all there but its network; telemetry is written by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "toy", PRESET)
        assert run_toy(ToyTrainer, ToySampler(), outdir=path, preset="toy", data="digits", status=256) == 0
    for nimg in range(0, 4096, 256):
        Run(path).append_telemetry(measurement(nimg))
    return path


def edit_config(run, **values):
    config = json.loads(run.config_path.read_text())
    del config["xxh3"]  # as of a run of other settings
    for name, value in values.items():
        (config["network"] if name in config["network"] else config)[name] = value
    run.config_path.write_text(json.dumps(config))


def report(*words):
    return main(["report", *map(str, words)])
