"""Files of PostHocEMA of the ema-pytorch library: ``{index}.{step}.pt``, one average each. Reading needs PyTorch."""

import re
from pathlib import Path

import numpy as np

from edm2_core.ema import Length, gamma_to_sigma_rel, sigma_rel_to_gamma
from edm2_core.errors import InputError

from .safetensors_io import Entry

_PREFIX = "ema_model."


class PostHocFile:
    """The arrays of such a file, memory-mapped and unpickled with weights only; a :class:`~.safetensors_io.Reader`.

    Raises:
        InputError: the file cannot be read, holds other objects than tensors, or no average.
    """

    def __init__(self, path: Path) -> None:
        import torch

        codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        codes |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
        self._bits = torch.uint16
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._tensors = {n.removeprefix(_PREFIX): t for n, t in state.items() if n.startswith(_PREFIX)}
            self.entries = {n: Entry(codes[t.dtype], tuple(t.shape), 0) for n, t in self._tensors.items()}
        except Exception as error:  # torch.load raises many types, depending on the bytes
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{path} must be a state of PostHocEMA, got '{why:.120}': copy it again") from error
        if not self.entries:
            raise InputError(f"{path} must be a state of PostHocEMA, got no ema_model in it: choose its folder")

    def fill(self, out: np.ndarray, name: str, start: int, /) -> None:
        part = self._tensors[name].reshape(-1)[start : start + out.size]
        out[:] = part.view(self._bits).numpy() if self.entries[name].dtype == "BF16" else part.numpy()


def index_and_step(path: Path) -> tuple[int, int]:
    """What the name says: which of the tracker's averages, and after how many steps."""
    named = re.fullmatch(r"(\d+)\.(\d+)", path.stem)
    if not named or not int(named[2]):
        raise InputError(f"{path} must be named as PostHocEMA names its files, 0.1000.pt, got another: rename it")
    return int(named[1]), int(named[2])


def tracked_length(requested: Length, update_every: int) -> Length:
    """The length that the average really has if the tracker was updated every k-th step as if it were every step.

    The weight of a step then falls as t^-((gamma + 1) / k) instead of t^-(gamma + 1). Half-lives are returned as they
    are.

    Raises:
        InputError: gamma would be negative.
    """
    if update_every == 1 or not requested.relative:
        return requested
    gamma = (sigma_rel_to_gamma(requested.value) + 1) / update_every - 1
    if gamma < 0:
        raise InputError(
            f"lengths must be within (0, 0.2887), got more: {requested} updated every {update_every} steps as if it "
            "were every step averages nearly all of training, and nothing shorter can be made of it"
        )
    return Length.of(float(gamma_to_sigma_rel(gamma)))
