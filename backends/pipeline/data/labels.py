"""Class ids to one-hot rows, the form of labels that networks take."""

import numpy as np

from edm2_core.errors import InputError


def one_hot(labels: np.ndarray, label_dim: int, /) -> np.ndarray:
    """float32 [n, label_dim] with a single 1 per row. Raises InputError unless ``labels`` are within [0, label_dim)."""
    labels = np.asarray(labels, np.int64)
    if len(outside := labels[(labels < 0) | (labels >= label_dim)]):
        raise InputError(f"a class must be from 0 to {label_dim - 1}, got {outside[0]}: choose one of these")
    return (labels[:, None] == np.arange(label_dim)).astype(np.float32)
