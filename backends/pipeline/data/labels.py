"""Labels as networks take them, one-hot rows, and where a network must be given them."""

from typing import Any, Protocol

import numpy as np

from edm2_core.errors import InputError


def one_hot(labels: np.ndarray, label_dim: int, /) -> np.ndarray:
    """float32 [n, label_dim] with a single 1 per row. Raises InputError unless ``labels`` are within [0, label_dim)."""
    labels = np.asarray(labels, np.int64)
    if len(outside := labels[(labels < 0) | (labels >= label_dim)]):
        raise InputError(f"a class must be from 0 to {label_dim - 1}, got {outside[0]}: choose one of these")
    return (labels[:, None] == np.arange(label_dim)).astype(np.float32)


class Labels(Protocol):
    """What a network was trained with: ``label_dim`` classes, of which the share ``label_dropout`` was dropped.

    A :class:`~edm2_core.network.NetworkConfig`, or a denoiser of one framework.
    """

    @property
    def label_dim(self) -> int: ...
    @property
    def label_dropout(self) -> float: ...


def check_labels(net: Labels, guide: Labels | None, labels: Any, guidance: float) -> None:
    """Raise InputError where sampling would call a network without the label that training never dropped.

    Commands and the Python interfaces check this; the NumPy interface of a port computes whatever it is asked.
    """
    if guidance != 1 and guide is None and labels is not None and net.label_dim and not net.label_dropout:
        raise InputError(
            "a network that guides itself must be trained with label dropout, got label_dropout 0: guide it by "
            "another trained without labels (--unconditional, then --guide), or train it with --label-dropout 0.1"
        )
    if labels is None and any(n is not None and n.label_dim and not n.label_dropout for n in (net, guide)):
        raise InputError(
            "a network trained with labels and label_dropout 0 must be sampled with labels, got None: give one-hot "
            "labels, or train it with --label-dropout 0.1"
        )
