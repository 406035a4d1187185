"""Averages of weights over training: tracked exactly at any interval, and of any length afterwards.

Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from .lengths import Length, LengthLike
from .planning import OpenPlan, SnapshotPlan, TimedPlan, plan_from_json, plan_snapshots, uniform_plan, worst_error
from .profiles import (
    LONGEST,
    beta,
    gamma_to_sigma_rel,
    inner_product,
    profile,
    sigma_rel_to_gamma,
)
from .reconstruction import (
    ReconstructionError,
    coefficients,
    reconstructed_profile,
    reconstruction_error,
)
from .tracking import advance, start

__all__ = [
    "LONGEST",
    "Length",
    "LengthLike",
    "OpenPlan",
    "ReconstructionError",
    "SnapshotPlan",
    "TimedPlan",
    "advance",
    "beta",
    "coefficients",
    "gamma_to_sigma_rel",
    "inner_product",
    "plan_from_json",
    "plan_snapshots",
    "profile",
    "reconstructed_profile",
    "reconstruction_error",
    "sigma_rel_to_gamma",
    "start",
    "uniform_plan",
    "worst_error",
]
