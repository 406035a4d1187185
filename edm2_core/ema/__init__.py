"""Averages of weights: tracked during training at any interval, and reconstructed at any length afterwards.

Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from .lengths import Length, LengthLike
from .planning import plan_snapshots
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
    StorageDtype,
    coefficients,
    reconstructed_profile,
    reconstruction_error,
)
from .snapshot_plans import OpenPlan, SnapshotPlan, TimedPlan, plan_from_json, uniform_plan, worst_error
from .tracking import advance, start

__all__ = [
    "LONGEST",
    "Length",
    "LengthLike",
    "OpenPlan",
    "ReconstructionError",
    "SnapshotPlan",
    "StorageDtype",
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
