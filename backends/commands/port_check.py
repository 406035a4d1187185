"""The check of one port that ``edm2 doctor`` runs, in a process of its own: a fault in a framework ends only that.

    python -m backends.commands.port_check torch         # prints one line of JSON

On each device, a tiny network is compared with the float64 reference, and trained for two steps.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np

from backends.pipeline.runs.exit_codes import missing_framework, to_install
from backends.pipeline.runs.fitting import free_bytes
from edm2_core import reference
from edm2_core.network import NetworkConfig, initialize

GROUP = "edm2.ports"
FORWARD, STEP = 1e-5, 1e-4
"""Relative errors allowed in float32: of an image, and of a loss, which also has those of a training step."""
NARROW: Mapping[str, float] = {"bfloat16": 0.05, "float16": 0.01}
"""Those of an image in narrow precisions."""
_CONFIG = NetworkConfig(
    img_resolution=8,
    img_channels=3,
    label_dim=4,
    model_channels=16,
    channel_mult=(1,),
    num_blocks=1,
    attn_resolutions=(8,),
    channels_per_head=16,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A port on a device. ``forward`` and ``step`` are errors over their tolerances: 1 is the most."""

    port: str
    device: str
    memory: str
    bfloat16: str
    float16: str
    tf32: str
    float64: str
    forward: float
    step: float
    seconds: float


def checked(name: str, /) -> dict[str, Any]:
    """The rows of the port registered as ``name``; or how to install what is ``absent``; or the ``problem``."""
    (point,) = metadata.entry_points(group=GROUP, name=name)
    try:
        port = point.load()
        return {"rows": [asdict(_row(name, one)) for one in _on_devices(port)]}
    except ImportError as error:
        if (framework := missing_framework(error)) is not None:
            return {"absent": to_install(framework)}
        return {"problem": _said(error)}
    except Exception as error:  # anything that a framework or its driver raises
        return {"problem": _said(error)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def _on_devices(port: Any) -> list[Any]:
    """The port on its usual device, and on the other devices of this machine."""
    others = port.variants().values() if hasattr(port, "variants") else ()
    usual, places = getattr(port, "device", None), [port]
    for other in others:
        if getattr(other, "device", usual) != usual:
            places.append(other)
    return places


def _row(name: str, port: Any) -> Row:
    start = time.perf_counter()
    params = _params()
    forward = _forward_error(port, params) / FORWARD
    step = _step_error(port, params) / STEP
    facts = _FACTS.get(name, _unknown)(getattr(port, "device", None))
    narrow = {precision: _narrow(port, params, precision) for precision in NARROW}
    seconds = time.perf_counter() - start
    return Row(port=name, forward=forward, step=step, seconds=seconds, **{**narrow, **facts})


# ---- errors


def _params() -> dict[str, np.ndarray]:
    """Initial weights, with gains that let all of them act."""
    params = initialize(_CONFIG, seed=0)
    return {name: np.float32(0.7) * np.ones_like(a) if name.endswith("gain") else a for name, a in params.items()}


def _batch() -> tuple[np.ndarray, ...]:
    """Images, noise, noise levels and labels."""
    rng = np.random.default_rng(0)
    images, noise = (rng.standard_normal((4, 3, 8, 8)).astype(np.float32) for _ in range(2))
    return 0.5 * images, noise, np.array([0.1, 0.5, 1, 4], np.float32).reshape(4, 1, 1, 1), np.eye(4, dtype=np.float32)


def _wide(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: np.asarray(value, np.float64) for name, value in values.items()}
    return [np.asarray(value, np.float64) for value in values]


def _forward_error(port: Any, params: Mapping[str, np.ndarray]) -> float:
    """Of the denoised images, relative to what the network adds to its input."""
    images, noise, sigma, labels = _batch()
    inputs = images + sigma * noise, sigma, labels
    wanted, _ = reference.denoise(_CONFIG, _wide(params), *_wide(inputs))
    got, _ = port.denoise(_CONFIG, params, *inputs)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def _step_error(port: Any, params: Mapping[str, np.ndarray]) -> float:
    """Of the losses before and after a step, whose weights the reference gets too; infinite if the loss rose."""
    batch, betas = _batch(), (0.9, 0.99)
    options = {"betas": betas, "sigma_rels": (0.1,)}
    _, after, _ = port.train(_CONFIG, params, [batch], learning_rates=[0.01], **options)
    losses, _, _ = port.train(_CONFIG, params, [batch] * 2, learning_rates=[0.01] * 2, **options)
    wanted = [float(np.mean(reference.loss(_CONFIG, _wide(p), *_wide(batch)))) for p in (params, after)]
    if not losses[1] < losses[0]:
        return float("inf")
    return max(abs(got - need) / abs(need) for got, need in zip(losses, wanted, strict=True))


def _narrow(port: Any, params: Mapping[str, np.ndarray], precision: str) -> str:
    """Whether the port computes in ``precision`` there, and well enough."""
    if not (is_dataclass(port) and hasattr(port, "precision")):
        return "-"
    try:
        error = _forward_error(replace(port, precision=precision), params)  # type: ignore[type-var]
    except Exception:  # what an unsupported dtype raises depends on the framework
        return "no"
    return "yes" if error <= NARROW[precision] else "wrong"


# ---- what the frameworks say of a device


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f} GiB free"


def _unknown(device: Any) -> dict[str, str]:
    return {"device": str(device), "memory": "-", "tf32": "-", "float64": "-"}


def _of_torch(device: str) -> dict[str, str]:
    import torch

    library = f"torch {torch.__version__}"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        facts = {
            "device": f"{count} x {torch.cuda.get_device_name()}, {library}",
            "memory": _gib(torch.cuda.mem_get_info()[0]),
            "tf32": "yes" if torch.cuda.get_device_capability() >= (8, 0) else "no",
            "float64": "yes",
        }
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        return facts | ({"bfloat16": "emulated"} if emulated else {})
    wide = "no" if device == "mps" else "yes"
    return {"device": f"{device}, {library}", "memory": _gib(free_bytes()), "tf32": "-", "float64": wide}


def _of_jax(device: Any) -> dict[str, str]:
    import jax

    place = jax.devices()[0] if device is None else device
    kind = place.platform if place.platform == "cpu" else f"{jax.device_count()} x {place.device_kind}"
    stats = place.memory_stats() or {}
    free = stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    major = str(getattr(place, "compute_capability", "")).partition(".")[0]
    return {
        "device": f"{kind}, jax {jax.__version__}",
        "memory": _gib(free_bytes() if place.platform == "cpu" else free),
        "tf32": "-" if place.platform != "gpu" else "yes" if major.isdecimal() and int(major) >= 8 else "no",
        "float64": "slow" if place.platform == "tpu" else "yes",
    }


def _of_mlx(device: str | None) -> dict[str, str]:
    import mlx.core as mx

    on_gpu = mx.is_available(mx.gpu) if device is None else device == "gpu"
    place = mx.Device(mx.gpu if on_gpu else mx.cpu)
    info = mx.device_info(place)
    name = info.get("device_name", info.get("architecture", ""))
    version = metadata.version("mlx")
    return {
        "device": f"{'gpu' if on_gpu else 'cpu'} {name}, mlx {version}",
        "memory": _gib(free_bytes()),
        "tf32": "-",
        "float64": "no" if on_gpu else "yes",
    }


_FACTS = {"torch": _of_torch, "jax": _of_jax, "mlx": _of_mlx}


if __name__ == "__main__":
    print(json.dumps(checked(sys.argv[1])))
