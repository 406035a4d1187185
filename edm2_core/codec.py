"""How stored data become what a network sees, and back: an affine map of each channel.

    x = (value - mean) / scale

8-bit pixels have mean and scale 127.5: x is from -1 to 1. Other data have their own mean, and twice their own standard
deviation as scale: x then has the standard deviation 0.5, as the paper's latents. Latents may be stored as the moments
that an encoder gives, mean and standard deviation; each time an image is seen, a new latent is drawn from them.

Source: arXiv 2312.02696 Appendix D.1 (latents). Departs from the paper: nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, Literal, cast, get_args

import numpy as np

from .arrays import A, Array, from_host, namespace, widened
from .errors import InputError

Stored = Literal["uint8", "float32", "moments"]
SIGMA_DATA = 0.5
"""The standard deviation that data are scaled to."""
SD_LATENTS = ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))
"""Mean and standard deviation of Stable Diffusion's latents of ImageNet. Source: arXiv 2312.02696 Appendix D.1."""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The map between stored values and what a network sees, and what is stored.

    ``stored``: 8-bit pixels, floats, or moments (twice as many channels as a network sees: means, then standard
    deviations). ``mean`` and ``scale``: of each channel, or one number for all. ``vae``: the autoencoder whose latents
    these are, a name or a folder; None: they are no latents.

    Raises:
        InputError: a scale that is not positive, or numbers that are not finite.
    """

    stored: Stored = "uint8"
    mean: tuple[float, ...] = (127.5,)
    scale: tuple[float, ...] = (127.5,)
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.stored not in get_args(Stored):
            raise InputError(f"a codec must store one of {', '.join(get_args(Stored))}, got {self.stored!r}")
        if not isinstance(self.vae, str | None):
            raise InputError(f"the vae of a codec must be a name or None, got {self.vae!r}")
        sizes = {len(self.mean), len(self.scale)}
        if (
            len(sizes) != 1
            or not all(_finite(m) for m in self.mean)
            or not all(_finite(s) and s > 0 for s in self.scale)
        ):
            raise InputError(
                f"a codec must have as many finite means as positive scales, got {self.mean} and {self.scale}: "
                "measure the data anew, and leave out channels that never change"
            )

    @classmethod
    def standardizing(cls, mean: Sequence[float], std: Sequence[float], /, **others: Any) -> "Codec":
        """The codec after which each channel has mean 0 and the standard deviation :data:`SIGMA_DATA`."""
        scale = tuple(float(s) / SIGMA_DATA for s in std)
        return cls(**{"stored": "float32", "mean": tuple(map(float, mean)), "scale": scale} | others)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], /) -> "Codec":
        """The codec of its fields as plain values. Raises InputError, KeyError or TypeError for those of another."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise InputError(f"fields of a codec must be {', '.join(sorted(known))}, got {unknown[0]!r}")
        return cls(**{**values, **{name: tuple(values[name]) for name in ("mean", "scale")}})

    def encode(self, values: A, /, *, axis: int = 1) -> A:
        """Stored values, of moments those that were drawn, as a network sees them.

        Shapes: any, kept; channels are on ``axis``. Dtype: float32, or wider as ``values``. Library and device: those
        of ``values``.
        """
        xp = namespace(values)
        x = widened(values) if xp.isdtype(values.dtype, "real floating") else xp.astype(values, xp.float32)
        return cast(A, (x - self._along(self.mean, x, axis)) / self._along(self.scale, x, axis))

    def decode(self, samples: A, /, *, axis: int = 1) -> A:
        """The inverse of :meth:`encode`: samples in the data's own units, neither clipped nor rounded."""
        return cast(A, samples * self._along(self.scale, samples, axis) + self._along(self.mean, samples, axis))

    @staticmethod
    def _along(numbers: tuple[float, ...], like: Array, axis: int) -> Any:
        if len(set(numbers)) == 1:
            return numbers[0]
        shape = [1] * like.ndim
        shape[axis] = len(numbers)
        return from_host(np.array(numbers, np.float64).reshape(shape), like=like)


PIXELS = Codec()
"""8-bit images."""


def draw_latents(moments: A, normal: A, /, *, axis: int = 1) -> A:
    """Latents of ``moments``, [N, 2 C, ...]: means plus standard deviations times ``normal``, [N, C, ...]."""
    half = moments.shape[axis] // 2
    before = (slice(None),) * (axis % moments.ndim)
    mean, std = (moments[(*before, part, ...)] for part in (slice(half), slice(half, None)))
    return cast(A, mean + std * normal)


@dataclass(frozen=True, kw_only=True)
class DataFormat:
    """What a network's data are, beside their shape: recorded with a run and in each of its snapshots.

    ``codec`` is that of the images, ``condition`` that of an image-shaped condition, None without one; ``classes`` are
    the names of the classes, where they are known.
    """

    codec: Codec = PIXELS
    condition: Codec | None = None
    classes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], /) -> "DataFormat":
        """The inverse of :meth:`to_json`, also after the values went through JSON text.

        Raises:
            InputError, KeyError, TypeError: values that it did not write.
        """
        condition = values["condition"]
        classes = tuple(values["classes"])
        if not all(isinstance(name, str) for name in classes):
            raise InputError(f"names of classes must be text, got {classes!r:.80}")
        return cls(
            codec=Codec.from_json(values["codec"]),
            condition=None if condition is None else Codec.from_json(condition),
            classes=classes,
        )
