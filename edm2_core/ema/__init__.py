"""Averages of weights over training: tracked exactly at any interval, and of any length afterwards.

Source: arXiv 2312.02696 Section 3 and Appendix C.
"""

from .profiles import LONGEST, beta, gamma_to_sigma_rel, inner_product, profile, sigma_rel_to_gamma
from .reconstruction import coefficients

__all__ = ["LONGEST", "beta", "coefficients", "gamma_to_sigma_rel", "inner_product", "profile", "sigma_rel_to_gamma"]
