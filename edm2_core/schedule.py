"""The learning rate over training: a linear ramp-up, then a constant, then the inverse square root of time."""

from math import sqrt

from .errors import InputError


def learning_rate(nimg: float, /, *, batch: int, ref_lr: float, ref_batches: float, rampup_nimg: float) -> float:
    """The learning rate after ``nimg`` images:

        ref_lr / sqrt(max(nimg / (ref_batches batch), 1)) * min(nimg / rampup_nimg, 1)

    Args:
        nimg: images seen since the start of training.
        batch: images per step.
        ref_lr: the highest learning rate.
        ref_batches: t_ref, the number of steps after which the rate falls as 1 / sqrt; 0 or inf: never.
        rampup_nimg: images over which the rate rises from 0; 0: none.

    Source: Eq. 67 and Appendix B.1 (ramp-up). Departs from the paper: nothing.

    Raises:
        InputError: a negative count, or a batch below 1.

    >>> learning_rate(400, batch=1, ref_lr=0.01, ref_batches=100, rampup_nimg=0)
    0.005
    """
    if min(nimg, ref_batches, rampup_nimg) < 0 or batch < 1:
        raise InputError(
            f"counts of images and batches must not be negative and a batch is at least 1, got nimg {nimg}, "
            f"batch {batch}, ref_batches {ref_batches}, rampup_nimg {rampup_nimg}"
        )
    decay = 1 / sqrt(max(nimg / (ref_batches * batch), 1)) if ref_batches else 1.0
    ramp = min(nimg / rampup_nimg, 1) if rampup_nimg else 1.0
    return ref_lr * decay * ramp
