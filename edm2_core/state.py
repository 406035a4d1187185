"""The training state between two steps, which ports, the conformance suite and third parties exchange."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .ema import Length

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything needed to continue training, as float32 NumPy arrays by canonical name.

    ``params``: the stored weights and constants. ``moments1`` and ``moments2``: Adam's running means of gradients
    and of their squares, for trained parameters only. ``averages``: by length, each with the names of ``params``.
    ``nimg``: images seen. ``steps``: optimizer steps taken.
    """

    params: Arrays
    moments1: Arrays
    moments2: Arrays
    averages: Mapping[Length, Arrays]
    nimg: int
    steps: int

    @classmethod
    def start(cls, params: Arrays, /, *, trained: Iterable[str], lengths: Iterable[Length]) -> "State":
        """The state before the first step: 0 as moments of the ``trained`` parameters, averages equal to ``params``."""
        zeros = {name: np.zeros_like(params[name], np.float32) for name in trained}
        averages = dict.fromkeys(lengths, params)
        return cls(params=params, moments1=zeros, moments2=zeros, averages=averages, nimg=0, steps=0)
