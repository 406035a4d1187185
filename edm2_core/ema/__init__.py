"""Averages of weights over training: tracked exactly at any interval, and of any length afterwards.

Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from .profiles import LONGEST, beta, gamma_to_sigma_rel, inner_product, profile, sigma_rel_to_gamma
from .reconstruction import (
    ReconstructionError,
    coefficients,
    half_life_of_raw,
    reconstructed_profile,
    reconstruction_error,
)

__all__ = [
    "LONGEST",
    "ReconstructionError",
    "beta",
    "coefficients",
    "gamma_to_sigma_rel",
    "half_life_of_raw",
    "inner_product",
    "profile",
    "reconstructed_profile",
    "reconstruction_error",
    "sigma_rel_to_gamma",
]
