"""Metrics of generated images by their features, beside the Fréchet distance: KID, precision and recall, density and
coverage, and the Inception score.

Features are [n, D] arrays of any library, best in float64. Everything is computed in blocks of rows, so memory grows
with n, not with its square.
"""

from collections.abc import Iterator
from typing import Any

from .arrays import Array, namespace
from .errors import InputError

_BLOCK = 1024  # rows


def kernel_distance(one: Array, other: Array, /) -> float:
    """KID: the unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, over all
    pairs of two sets of features, [n, D] and [m, D].

    Source: Bińkowski et al., arXiv 1801.01401 section 4. Departs from it: over the whole sets, where published code
    averages over random subsets, which has the same expectation and more variance.

    Raises:
        InputError: fewer than two features in a set, or features of different numbers.
    """
    xp = namespace(one, other)
    _check(one, other, least=2)
    n, m, width = one.shape[0], other.shape[0], one.shape[1]

    def total(a: Any, b: Any) -> Any:
        return sum(xp.sum((xp.matmul(part, xp.matrix_transpose(b)) / width + 1) ** 3) for part in _blocks(a))

    def own(a: Any) -> Any:
        """The terms of pairs of a feature with itself."""
        return xp.sum((xp.sum(a * a, axis=1) / width + 1) ** 3)

    inside = (total(one, one) - own(one)) / (n * (n - 1)) + (total(other, other) - own(other)) / (m * (m - 1))
    return float(inside - 2 * total(one, other) / (n * m))


def manifold_metrics(real: Array, generated: Array, /, *, neighbours: int = 3) -> dict[str, float]:
    """``precision``, ``recall``, ``density`` and ``coverage`` of generated features [m, D] against real ones [n, D].

    Around each feature of a set is a ball that reaches to its ``neighbours``-th nearest of the same set. Precision:
    the share of generated features within a ball of a real one; recall: the reverse. Density: how many real balls hold
    a generated feature, over ``neighbours``; coverage: the share of real balls that hold one.

    Source: Kynkäänniemi et al., arXiv 1904.06991 equations 1 and 2; Naeem et al., arXiv 2002.09797 equations 3 and 4.
    Both count a feature on the border as inside.

    Raises:
        InputError: no more features in a set than ``neighbours``, or features of different numbers.
    """
    _check(real, generated, least=neighbours + 1)
    of_real, of_generated = (_radii(x, neighbours) for x in (real, generated))
    held = recalled = density = 0
    nearest: Any = None  # squared distance from each real feature to a generated one
    for part in _blocks(generated):
        squares = _squares(part, real)
        xp: Any = namespace(squares)
        inside = squares <= of_real[None, :]
        held, density = held + _count(xp.any(inside, axis=1)), density + _count(inside)
        least = xp.min(squares, axis=0)
        nearest = least if nearest is None else xp.minimum(nearest, least)
    for part in _blocks(real):
        inside = _squares(part, generated) <= of_generated[None, :]
        recalled += _count(namespace(part).any(inside, axis=1))
    n, m = real.shape[0], generated.shape[0]
    return {
        "precision": held / m,
        "recall": recalled / n,
        "density": density / (neighbours * m),
        "coverage": _count(nearest <= of_real) / n,
    }


def inception_score(logits: Array, /) -> float:
    """exp(mean KL(p(y | x) || p(y))) over images whose class scores before the softmax are [n, classes].

    Source: Salimans et al., arXiv 1606.03498 section 4. Departs from it: over all images, where published code averages
    over ten parts.
    """
    xp: Any = namespace(logits)
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    log_p = shifted - xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    p = xp.exp(log_p)
    mean = xp.mean(p, axis=0)
    seen = xp.where(mean > 0, mean, xp.ones_like(mean))
    return float(xp.exp(xp.mean(xp.sum(p * (log_p - xp.log(seen)), axis=1))))


def _check(one: Array, other: Array, *, least: int) -> None:
    for features in (one, other):
        if features.shape[0] < least:
            raise InputError(f"this metric must have at least {least} images, got {features.shape[0]}: measure more")
    if one.shape[1] != other.shape[1]:
        raise InputError(
            f"features must be of the same extractor, got {one.shape[1]} and {other.shape[1]} numbers: measure anew"
        )


def _count(mask: Any) -> int:
    xp: Any = namespace(mask)
    return int(xp.sum(xp.astype(mask, xp.int64)))


def _blocks(x: Any) -> Iterator[Any]:
    for start in range(0, x.shape[0], _BLOCK):
        yield x[start : min(start + _BLOCK, x.shape[0]), ...]


def _squares(one: Any, other: Any) -> Any:
    """Squared distances [n, m]."""
    xp = namespace(one)
    lengths = xp.sum(one * one, axis=1)[:, None] + xp.sum(other * other, axis=1)[None, :]
    return xp.maximum(lengths - 2 * xp.matmul(one, xp.matrix_transpose(other)), xp.zeros_like(lengths))


def _radii(x: Any, neighbours: int) -> Any:
    """Squared distance of each feature to its ``neighbours``-th nearest other one, [n]."""
    xp = namespace(x)
    # the nearest is the feature itself
    return xp.concat([xp.sort(_squares(part, x), axis=1)[:, neighbours] for part in _blocks(x)])
