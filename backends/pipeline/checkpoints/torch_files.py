"""Files of ``torch.save``: of PostHocEMA of the ema-pytorch library, ``{index}.{step}.pt``, one average each; of
Lightning; and plain weights. Reading needs PyTorch."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edm2_core.ema import Length, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2_core.errors import InputError

from .file_times import some
from .safetensors_io import DTYPES, Entry

_PREFIX = "ema_model."


class TorchFile:
    """The tensors of a file of ``torch.save``, memory-mapped and unpickled with weights only; a
    :class:`~.safetensors_io.Reader`.

    A state of PostHocEMA, a checkpoint of Lightning, or any dict of tensors, perhaps within another dict. ``time`` is
    what the file records, or None; ``posthoc`` whether it is of PostHocEMA.

    Raises:
        InputError: the file cannot be read, holds code, or no dict of tensors, or several.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        codes = {torch.from_numpy(np.empty(0, dtype)).dtype: code for code, dtype in DTYPES.items() if code != "BF16"}
        codes[torch.bfloat16] = "BF16"
        self._bits = torch.uint16
        try:
            state = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
            self.posthoc = any(str(name).startswith(_PREFIX) for name in state)
            self.time = step if isinstance(step := state.get("global_step"), int) and step > 0 else None
            tensors = _posthoc(state) if self.posthoc else _weights(path, state, torch.Tensor)
            if others := [name for name, t in tensors.items() if t.dtype not in codes]:
                got = f"{tensors[others[0]].dtype} in {others[0]}"
                raise InputError(f"{path} must hold {', '.join(DTYPES)}, got {got}: convert it")
            self._tensors = {name: t.detach() for name, t in tensors.items()}
            self.entries = {n: Entry(codes[t.dtype], tuple(t.shape), 0) for n, t in self._tensors.items()}
        except InputError:
            raise
        except Exception as error:  # torch.load raises many types, depending on the bytes
            if refused := re.search(r"GLOBAL (\S+)", str(error)):
                why = f"{path} must hold tensors and plain values, got {refused[1]}"
                raise InputError(f"{why}, which may run code: save the weights alone") from error
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} must be a dict of tensors, got '{why:.120}': copy it again") from error

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        part = self._tensors[name].reshape(-1)[start : start + out.size]
        out[:] = part.view(self._bits).numpy() if self.entries[name].dtype == "BF16" else part.numpy()


def _posthoc(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_PREFIX): t for name, t in state.items() if name.startswith(_PREFIX)}


def _weights(path: Path, state: Mapping[str, Any], tensor: type) -> dict[str, Any]:
    """The one dict of tensors in ``state``: itself, or that under one of its keys."""
    inner = {
        key: value
        for key, value in state.items()
        if isinstance(value, Mapping) and value and all(isinstance(x, tensor) for x in value.values())
    }
    own = {name: value for name, value in state.items() if isinstance(value, tensor)}
    if len(inner) + bool(own) != 1:
        got = some([*map(str, inner), *own] or list(map(str, state)) or ["nothing"])
        raise InputError(f"{path} must hold one dict of tensors, got {got}: save the one that is wanted")
    return own or dict(next(iter(inner.values())))


def index_and_step(path: Path) -> tuple[int, int]:
    """What the name says: which of the tracker's averages, and after how many steps."""
    named = re.fullmatch(r"(\d+)\.(\d+)", path.stem)
    if not named or not int(named[2]):
        raise InputError(f"{path} must be named as PostHocEMA names its files, 0.1000.pt, got another: rename it")
    return int(named[1]), int(named[2])


class Unreachable(InputError):
    """An average of which nothing can be made."""


def tracked_length(requested: Length, update_every: int) -> Length:
    """The length that the average really has if the tracker was updated every k-th step as if it were every step.

    The weight of a step then falls as t^-((gamma + 1) / k) instead of t^-(gamma + 1). Half-lives are returned as they
    are.

    Raises:
        Unreachable: gamma would be negative.
    """
    if update_every == 1 or not requested.relative:
        return requested
    gamma = (sigma_rel_to_gamma(requested.value) + 1) / update_every - 1
    if gamma < 0:
        raise Unreachable(
            f"lengths must be within (0, 0.2887), got more: {requested} updated every {update_every} steps as if it "
            "were every step averages nearly all of training, and nothing shorter can be made of it"
        )
    return Length.of(float(gamma_to_sigma_rel(gamma)))
