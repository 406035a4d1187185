"""The published networks and the settings that their published scores were measured with, as data.

Sources: arXiv 2312.02696 Tables 2, 4 and 5; arXiv 2406.02507 Table 1; names of files and lengths as the authors publish
them. A score is FID, or FD by DINOv2, of 50,000 images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .errors import InputError

URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
"""Where the files are published."""
REFERENCES = {"img512": "img512.pkl", "img64": "img64.pkl"}
"""Files of reference statistics by data, at :data:`REFERENCE_URL`."""
REFERENCE_URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs"
Metric = Literal["fid", "fd-dinov2"]


@dataclass(frozen=True)
class Published:
    """File names of a network and of its guide (None without guidance), the guidance weight, and the score."""

    net: str
    guide: str | None
    guidance: float
    metric: Metric
    score: float


_METRICS: dict[str, Metric] = {"fid": "fid", "dino": "fd-dinov2"}
# thousands of images
_KIMG = {"xs": 2147483, "s": 2147483, "m": 2147483, "l": 1879048, "xl": 1342177, "xxl": 939524}
_KIMG_64 = {"s": 1073741, "m": 2147483, "l": 1073741, "xl": 671088}

# size: for each metric the length and the score
_PLAIN = {
    "xs": ((0.135, 3.53), (0.200, 103.39)),
    "s": ((0.130, 2.56), (0.190, 68.64)),
    "m": ((0.100, 2.25), (0.155, 58.44)),
    "l": ((0.085, 2.06), (0.155, 52.25)),
    "xl": ((0.085, 1.96), (0.155, 45.96)),
    "xxl": ((0.070, 1.91), (0.150, 42.84)),
}
_PLAIN_64 = {"s": (0.075, 1.58), "m": (0.060, 1.43), "l": (0.040, 1.33), "xl": (0.040, 1.33)}
# size: for each metric the length of the network and of the guide, an unconditional XS; the weight; and the score
_GUIDED = {
    "xs": ((0.045, 1.40, 2.91), (0.150, 1.70, 79.94)),
    "s": ((0.025, 1.40, 2.23), (0.085, 1.90, 52.32)),
    "m": ((0.030, 1.20, 2.01), (0.015, 2.00, 41.98)),
    "l": ((0.015, 1.20, 1.88), (0.035, 1.70, 38.20)),
    "xl": ((0.020, 1.20, 1.85), (0.030, 1.70, 35.67)),
    "xxl": ((0.015, 1.20, 1.81), (0.015, 1.70, 33.09)),
}
# network and guide with thousands of images; for each metric the two lengths, the weight and the score
_AUTOGUIDED = {
    ("img512-s", 2147483, "img512-xs", 134217): ((0.070, 0.125, 2.10, 1.34), (0.120, 0.165, 2.45, 36.67)),
    ("img512-xxl", 939524, "img512-m", 268435): ((0.075, 0.155, 2.05, 1.25), (0.130, 0.205, 2.30, 24.18)),
    ("img512-s-uncond", 2147483, "img512-xs-uncond", 134217): ((0.070, 0.110, 2.85, 3.86), (0.090, 0.125, 2.90, 90.39)),
    ("img64-s", 1073741, "img64-xs", 134217): ((0.045, 0.110, 1.70, 1.01), (0.105, 0.175, 2.20, 31.85)),
}


def _file(network: str, kimg: int, length: float) -> str:
    return f"edm2-{network}-{kimg:07d}-{length:.3f}.pkl"


def _table() -> Iterator[tuple[str, Published]]:
    for i, (word, metric) in enumerate(_METRICS.items()):
        for size, rows in _PLAIN.items():
            length, score = rows[i]
            net = _file(f"img512-{size}", _KIMG[size], length)
            yield f"edm2-img512-{size}-{word}", Published(net, None, 1.0, metric, score)
        for size, guided in _GUIDED.items():
            length, weight, score = guided[i]
            net = _file(f"img512-{size}", _KIMG[size], length)
            guide = _file("img512-xs-uncond", _KIMG["xs"], length)
            yield f"edm2-img512-{size}-guid-{word}", Published(net, guide, weight, metric, score)
        for (network, kimg, other, other_kimg), pairs in _AUTOGUIDED.items():
            length, other_length, weight, score = pairs[i]
            net, guide = _file(network, kimg, length), _file(other, other_kimg, other_length)
            yield f"edm2-{network}-autog-{word}", Published(net, guide, weight, metric, score)
    for size, (length, score) in _PLAIN_64.items():
        yield (
            f"edm2-img64-{size}-fid",
            Published(_file(f"img64-{size}", _KIMG_64[size], length), None, 1.0, "fid", score),
        )


PUBLISHED: dict[str, Published] = dict(_table())
"""By name, such as ``edm2-img512-s-guid-fid``: network, guide and weight."""


def published(name: str, /) -> Published:
    """The published combination called ``name``. Raises InputError for an unknown name."""
    if name not in PUBLISHED:
        raise InputError(f"--preset must be one of {', '.join(PUBLISHED)}, got {name!r}")
    return PUBLISHED[name]
