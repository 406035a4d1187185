"""The Fréchet distance between Gaussians fitted to two sets of features, which FID and FD-DINOv2 are.

    d^2 = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))

m and C are the mean and the covariance of the features of a set.

Source: Heusel et al., arXiv 1706.08500 equation 6; moments of parts joined as in Chan, Golub and LeVeque (1983).
"""

from dataclasses import dataclass
from typing import Any

from .arrays import Array, namespace
from .errors import InputError


@dataclass(frozen=True)
class Moments:
    """Number, mean [D] and scatter [D, D] of features: the scatter is the sum of products of deviations from the mean.

    Moments of parts are joined by :meth:`joined`, so a set of any size needs the memory of one batch. Dtype: that of
    the features; use float64, in which a million features keep about ten digits.
    """

    count: int
    mean: Any
    scatter: Any

    @classmethod
    def of(cls, features: Array, /) -> "Moments":
        """Moments of features [n, D], n at least 1."""
        xp = namespace(features)
        mean = xp.mean(features, axis=0)
        centred = features - mean
        return cls(features.shape[0], mean, xp.matmul(xp.matrix_transpose(centred), centred))

    def joined(self, other: "Moments", /) -> "Moments":
        """Moments of both sets together."""
        xp, count = namespace(self.mean), self.count + other.count
        step = other.mean - self.mean
        between = xp.expand_dims(step, axis=1) * xp.expand_dims(step, axis=0)
        return Moments(
            count,
            self.mean + step * (other.count / count),
            self.scatter + other.scatter + between * (self.count * other.count / count),
        )

    def gaussian(self) -> "Gaussian":
        """The mean and the unbiased covariance. Raises InputError for fewer than two features."""
        if self.count < 2:
            raise InputError(f"a covariance must be of at least 2 images, got {self.count}: measure more")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features."""

    mean: Any
    covariance: Any


def distance(one: Gaussian, other: Gaussian, /) -> float:
    """The squared Fréchet distance, as FID is given.

    The trace of (C C')^(1/2) is the sum of the singular values of L^T L', where C = L L^T and C' = L' L'^T: covariances
    may be singular, which they are for fewer images than features. Eigenvalues that are only rounding, up to D epsilon
    times the largest, are taken as 0: their square roots would be large.

    Raises:
        InputError: features of different numbers, or values that are not finite.
    """
    if tuple(one.mean.shape) != tuple(other.mean.shape):
        raise InputError(
            f"statistics must be of the same features, got {one.mean.shape[0]} and {other.mean.shape[0]} of them: "
            "measure both with the same extractor"
        )
    xp: Any = namespace(one.mean)
    for gaussian in (one, other):
        if not bool(xp.all(xp.isfinite(gaussian.mean))) or not bool(xp.all(xp.isfinite(gaussian.covariance))):
            raise InputError("statistics must be finite, got values that are not: measure them anew")
    shared = xp.matmul(xp.matrix_transpose(_factor(one.covariance)), _factor(other.covariance))
    apart = one.mean - other.mean
    total = xp.sum(apart * apart) + xp.linalg.trace(one.covariance) + xp.linalg.trace(other.covariance)
    return float(total - 2 * xp.sum(xp.linalg.svdvals(shared)))


def _factor(covariance: Any) -> Any:
    """L with C = L L^T."""
    xp: Any = namespace(covariance)
    values, vectors = xp.linalg.eigh((covariance + xp.matrix_transpose(covariance)) / 2)
    rounding = xp.max(values) * (values.shape[0] * xp.finfo(values.dtype).eps)
    return vectors * xp.sqrt(xp.where(values > rounding, values, xp.zeros_like(values)))
