"""The golden numbers: outputs of the official implementation, stored as arrays.

``EDM2_GOLDEN`` names their folder; default: ``../shared/golden`` relative to the project's root. Tests that need them
carry :data:`needs_golden` and skip where the folder is absent.
"""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edm2_core.network import NetworkConfig

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "../shared/golden"
FOLDER = ROOT / os.environ.get("EDM2_GOLDEN", DEFAULT)
NETWORKS = ("net_plain", "net_cond_attn")

REASON = "golden numbers are absent: set EDM2_GOLDEN to their folder"
present = any(folder.is_dir() for folder in (FOLDER, DEFAULT))  # if so, none of their tests may skip
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=REASON)
each_network = pytest.mark.parametrize("case", NETWORKS)


@lru_cache
def arrays(name: str) -> Mapping[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@lru_cache
def ema_lr() -> Any:
    return json.loads((FOLDER / "ema_lr.json").read_text())


def config(case: Mapping[str, np.ndarray]) -> NetworkConfig:
    return NetworkConfig(**json.loads(str(case["config"])), sigma_data=0.5, logvar_channels=32)


def named(case: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays called ``prefix:NAME``, by NAME."""
    return {key.removeprefix(f"{prefix}:"): value for key, value in case.items() if key.startswith(f"{prefix}:")}
