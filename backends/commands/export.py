"""edm2 export: a network for other tools, without a pickle.

directory   model.safetensors, which edm2 reads as --net DIRECTORY and all others as weights by name; network.json
official    the same, and make_pickle.py: run in a clone of the official code, it makes a file that its tools load. Such
            a file carries that code's own source, so it cannot be made without it.
diffusers   a folder in diffusers' layout, for EDM2Pipeline.from_pretrained of backends.torch.diffusers_pipeline
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from backends.pipeline.checkpoints.atomic import write_bytes
from backends.pipeline.checkpoints.safetensors_io import write_tensors
from backends.pipeline.checkpoints.snapshots import Snapshot, description, save_snapshot
from backends.pipeline.checkpoints.storage import StorageDtype, stored_arrays
from backends.pipeline.runs.networks import WEIGHTS, open_network
from edm2_core.errors import InputError
from edm2_core.ladder import LADDER
from edm2_core.network import NetworkConfig, plan

DESCRIPTION, SCRIPT = "network.json", "make_pickle.py"
_PIPELINE = "backends.torch.diffusers_pipeline"
_DIFFUSERS = "0.30.0"  # the oldest version that reads these files
_OFFICIAL = (  # arguments of the official network, which have the names of ours
    *("model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("channels_per_head", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act", "dropout"),
    *("resample_filter", "sigma_data", "logvar_channels"),
)
_TEMPLATE = '''"""Run in a clone of https://github.com/NVlabs/edm2. Writes network.pkl beside this file."""
import pathlib, pickle, safetensors.torch
from training.encoders import {encoder_class}
from training.networks_edm2 import Precond
here = pathlib.Path(__file__).parent
net = Precond({shape}, {settings})
net.load_state_dict(safetensors.torch.load_file(here / "{weights}"))
encoder = {encoder_class}({encoder})
content = dict(ema=net.eval().requires_grad_(False), encoder=encoder, dataset_kwargs=dict(), loss_fn=None)
(here / "network.pkl").write_bytes(pickle.dumps(content))
'''


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ``edm2 export``."""

    source: tyro.conf.Positional[Path]
    """A snapshot, a run, an official pickle, or a folder of either."""
    dest: tyro.conf.Positional[Path]
    """Folder to write, which must not exist."""
    to: Literal["directory", "official", "diffusers"] = "directory"
    """For which tools."""
    sigma_rel: float | None = None
    """Relative length of the average of a run, reconstructed if it is not stored."""
    dtype: StorageDtype = "float32"
    """Dtype of the weights."""


def run(options: Options) -> None:
    """Write the folder and print what is in it.

    Raises:
        InputError: no such network, a folder that exists, or a network that the official code cannot be.
    """
    if options.dest.exists():
        raise InputError(f"dest must be a new folder, got {options.dest}, which exists: choose another")
    found = open_network(options.source, sigma_rel=options.sigma_rel)
    snapshot = found.snapshot
    print(f"network   {found.origin}")
    if options.to == "diffusers":
        return _write_pipeline(options, snapshot)
    script = _script(snapshot) if options.to == "official" else None
    save_snapshot(options.dest / WEIGHTS, snapshot, dtype=options.dtype)
    _write_json(options.dest / DESCRIPTION, description(snapshot))
    print(f"wrote     {options.dest / WEIGHTS}, {DESCRIPTION}")
    if script is not None:
        write_bytes(options.dest / SCRIPT, script.encode())
        print(f"next      in a clone of the official code: python {options.dest.absolute() / SCRIPT}")


def _write_pipeline(options: Options, snapshot: Snapshot) -> None:
    """The files that diffusers' ``save_pretrained`` writes of a pipeline."""
    described = description(snapshot)
    model = {"_class_name": "EDM2Model", "_diffusers_version": _DIFFUSERS}
    index: dict[str, Any] = {
        "_class_name": "EDM2Pipeline",
        "_diffusers_version": _DIFFUSERS,
        "model": [_PIPELINE, "EDM2Model"],
    }
    index |= {name: [None, None] for name in ("vae", "guide")} | {"scheduler": [_PIPELINE, "EDM2Scheduler"]}
    scheduler = {"_class_name": "EDM2Scheduler", "_diffusers_version": _DIFFUSERS}  # with its own defaults
    params = ((f"net.{name}", np.asarray(array)) for name, array in snapshot.params.items())
    constants = [f"net.{name}" for name, p in plan(snapshot.required_config()).parameters.items() if not p.trained]
    arrays, _ = stored_arrays(params, kept=constants, dtype=options.dtype)
    folder = options.dest / "model"
    write_tensors(folder / "diffusion_pytorch_model.safetensors", arrays, {"format": "pt"})
    _write_json(folder / "config.json", {**model, "network": described["network"], "data": described["data"]})
    _write_json(options.dest / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(options.dest / "model_index.json", index)
    print(f"wrote     {options.dest}")
    print(f"next      from {_PIPELINE} import EDM2Pipeline; EDM2Pipeline.from_pretrained({str(options.dest)!r})")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_bytes(path, json.dumps(values, indent=1).encode() + b"\n")


def _script(snapshot: Snapshot) -> str:
    """A program of the official code's names that makes its file. Raises InputError where it has no such network."""
    config = snapshot.required_config()
    codec = None if snapshot.data is None else snapshot.data.codec
    for wanted, got in _differences(config):
        raise InputError(f"the official network must have {wanted}, got {got}: export it to a directory instead")
    if codec is not None and codec.stored == "moments":
        latents = ("StabilityVAEEncoder", f"vae_name={codec.vae!r}, raw_mean={list(codec.mean)}, ")
        std = [0.5 * scale for scale in codec.scale]
        encoder_class, encoder = latents[0], latents[1] + f"raw_std={std}"
    elif codec is None or codec.stored == "uint8":
        encoder_class, encoder = "StandardRGBEncoder", ""
    else:
        raise InputError(f"official encoders are of pixels and of Stability's latents, got {codec.stored} data")
    settings = ", ".join(f"{name}={_value(getattr(config, name))}" for name in _OFFICIAL)
    shape = f"{config.image_size[0]}, {config.img_channels}, {config.label_dim}"
    return _TEMPLATE.format(
        shape=shape, settings=settings, weights=WEIGHTS, encoder_class=encoder_class, encoder=encoder
    )


def _value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differences(config: NetworkConfig) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    if config.switches != LADDER["G"]:
        found.append(("CONFIG G", f"CONFIG {config.ladder} or other switches"))
    if config.image_size[0] != config.image_size[1]:
        found.append(("square images", config.image_size))
    for name in ("cond_channels", "pad"):
        if getattr(config, name):
            found.append((f"no {name}", getattr(config, name)))
    return found
