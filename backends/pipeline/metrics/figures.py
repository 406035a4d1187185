"""Metrics by name, computed of statistics, and the records of what was measured.

fid, kid, is, precision-recall   by Inception
fd-dinov2                        the Fréchet distance by DINOv2
KIND@EXTRACTOR                   frechet, kernel or manifold by any extractor, such as frechet@pixels; inception-score
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from edm2_core.errors import InputError
from edm2_core.frechet import distance
from edm2_core.metrics import inception_score, kernel_distance, manifold_metrics

from .extractors import KNOWN
from .statistics import Statistics

ENOUGH = 50_000
"""The number of images that published figures are of."""
_KINDS = ("frechet", "kernel", "manifold", "inception-score")
_HIGHER_IS_BETTER = ("manifold", "inception-score")
_NAMES = {
    "fid": "frechet@inception",
    "fd-dinov2": "frechet@dinov2",
    "kid": "kernel@inception",
    "precision-recall": "manifold@inception",
    "is": "inception-score@inception",
}


@dataclass(frozen=True)
class Metric:
    """``name`` as it was asked for, the kind of figure, and the extractor of features."""

    name: str
    kind: str
    extractor: str

    @classmethod
    def called(cls, name: str, /) -> "Metric":
        """The metric of that name. Raises InputError for an unknown one."""
        kind, _, extractor = _NAMES.get(name, name).partition("@")
        known = extractor in KNOWN or ":" in extractor
        if kind not in _KINDS or not known or (kind == "inception-score" and extractor != "inception"):
            raise InputError(
                f"a metric must be one of {', '.join(_NAMES)}, or a kind ({', '.join(_KINDS[:3])}) and an extractor "
                f"({', '.join(KNOWN)} or MODULE:FUNCTION) such as frechet@pixels, got {name!r}"
            )
        return cls(name, kind, extractor)

    @property
    def keeps_features(self) -> bool:
        """Whether all features are needed, rather than their moments."""
        return self.kind != "frechet"

    @property
    def main(self) -> str:
        """The name of the figure to choose by."""
        return "precision" if self.kind == "manifold" else self.name

    def loss(self, figure: float, /) -> float:
        """``figure``, the one called :attr:`main`, with the sign that makes the lowest the best."""
        return -figure if self.kind in _HIGHER_IS_BETTER else figure

    def check_reference(self, reference: Statistics | None, /) -> None:
        """Raise InputError where the metric needs a reference and there is none."""
        if reference is None and self.kind != "inception-score":
            raise InputError(f"{self.name} must have a --reference, got none: name data, or a file of statistics")

    def of(self, made: Statistics, reference: Statistics | None, /) -> dict[str, float]:
        """Figures by name. ``reference`` may be None for the Inception score.

        Raises:
            InputError: images of other sizes than the reference's, a reference without the features that the metric
                needs, or too few images.
        """
        if self.kind == "inception-score":
            if made.logits is None:
                raise InputError("the Inception score must have class scores, got none: measure the images anew")
            return {self.name: inception_score(made.logits.astype(np.float64))}
        self.check_reference(reference)
        assert reference is not None  # checked
        if reference.size is not None and made.size is not None and reference.size != made.size:
            raise InputError(
                f"images and reference must be of one size, got {_size(made)} and {_size(reference)}: measure data of "
                "the images' own size"
            )
        if self.kind == "frechet":
            return {self.name: distance(made.gaussian, reference.gaussian)}
        if made.features is None or reference.features is None:
            raise InputError(
                f"{self.name} needs the features of all images, got only their statistics: give data as --reference"
            )
        features = [part.features.astype(np.float64) for part in (made, reference) if part.features is not None]
        if self.kind == "kernel":
            return {self.name: kernel_distance(*features)}
        return manifold_metrics(features[1], features[0])


def warnings(metric: Metric, made: Statistics, /) -> list[str]:
    """What a reader of a figure must know of it."""
    said, dimension = [], len(made.gaussian.mean)
    if made.count is not None and made.count < ENOUGH:
        said.append(f"{metric.name} of {made.count} images cannot be compared with figures of {ENOUGH}: it is biased")
    if metric.kind == "frechet" and made.count is not None and made.count <= dimension:
        said.append(f"the covariance of {made.count} images in {dimension} dimensions is singular: measure more images")
    return said


def record(metric: Metric, made: Statistics, figures: dict[str, float]) -> dict[str, Any]:
    """A line for a file of figures."""
    return {
        "metric": metric.name,
        "extractor": made.extractor,
        "count": made.count,
        "figures": figures,
    }


def _size(statistics: Statistics) -> str:
    height, width = statistics.size or (0, 0)
    return f"{width}x{height}"
