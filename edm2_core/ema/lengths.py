"""The length of an average: relative to the training time (power-function averages), or a half-life (traditional).

    Length.of(0.05)             an average of relative length sigma_rel = 0.05
    Length.half_life(500_000)   a traditional average whose half-life is 500,000 images

Functions that take a length also take a plain number, which is a sigma_rel.
"""

from dataclasses import dataclass
from math import inf, log
from typing import Literal

import numpy as np

from .profiles import Profile, beta, check_range, expm1, sigma_rel_to_gamma

_TAG = "HalfLife"  # in the text form of a half-life, which is part of the file formats


@dataclass(frozen=True, order=True)
class Length:
    """How long an average is. ``value`` is sigma_rel, or the half-life in the unit of time.

    Lengths are ordered: half-lives first, each kind from short to long.

    Raises:
        InputError: a sigma_rel outside (0, 0.2887), or a half-life that is not positive and finite.
    """

    kind: Literal["half_life", "sigma_rel"]
    value: float

    def __post_init__(self) -> None:
        if self.kind == "sigma_rel":
            sigma_rel_to_gamma(self.value)
        else:
            check_range(self.value, "half_life", "positive and finite", lambda x: (x > 0) & (x < inf))

    @classmethod
    def of(cls, length: "LengthLike | str", /) -> "Length":
        """Convert to a Length: from a number, which is a sigma_rel; from the text of :attr:`key`; or from a Length."""
        if isinstance(length, Length):
            return length
        if isinstance(length, str) and length.startswith(f"{_TAG}("):
            return cls.half_life(float(length[len(_TAG) + 1 : -1]))
        return cls("sigma_rel", float(length))

    @classmethod
    def half_life(cls, time: float, /) -> "Length":
        """The length of a traditional average with half-life ``time``."""
        return cls("half_life", float(time))

    @classmethod
    def raw(cls, step: float, /) -> "Length":
        """A half-life that represents raw weights, each valid for one ``step`` (a batch, if time counts images).

        An exponential with time constant step / 2 has the same L2 norm as a box of length step.
        """
        return cls.half_life(log(2) * step / 2)

    @property
    def relative(self) -> bool:
        """Whether this is a sigma_rel, whose average covers a fixed share of training."""
        return self.kind == "sigma_rel"

    @property
    def key(self) -> str:
        """The text form used in files and state dicts: ``0.05``, or ``HalfLife(2000.0)``. :meth:`of` reads it."""
        return repr(self.value) if self.relative else f"{_TAG}({self.value!r})"

    def __str__(self) -> str:
        return f"{self.value:g}" if self.relative else f"half-life {self.value:.10g}"

    def beta(self, *, t_next: float, t_delta: float) -> float:
        """The factor on the old average when time advances by ``t_delta`` to ``t_next``. Exact for any ``t_delta``.

        Source: :func:`~edm2_core.ema.beta` (Eq. 127); for a half-life h, 1 - (1 - 2^(-t_delta / h)) / (1 - 2^(-t_next /
        h)), from the profile of a traditional average that starts at 0 and is corrected for it. Raises InputError
        unless 0 < t_delta <= t_next.
        """
        if self.relative:
            return float(beta(self.value, t_next=t_next, t_delta=t_delta))
        check_range(t_delta, "t_delta", "positive", lambda x: x > 0)
        check_range(t_delta / t_next, "t_delta / t_next", "at most 1", lambda x: (x > 0) & (x <= 1))
        rate = log(2) / self.value
        return float(1 - expm1(-rate * t_delta) / expm1(-rate * t_next))

    def profile(self, time: "float | np.ndarray", /) -> Profile:
        """The profile of the average at ``time`` (NumPy array or number)."""
        return Profile.power(time, self.value) if self.relative else Profile.traditional(time, self.value)


LengthLike = Length | float
"""A length as functions take it: a number is a sigma_rel."""
