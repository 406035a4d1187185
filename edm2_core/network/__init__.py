"""The EDM2 network as data: what a person chooses, the plan that ports walk, initial parameters, and what it costs."""

from .config import GROUP_NORM_EPS, NetworkConfig
from .cost import activation_count, multiply_adds, parameter_count
from .init import initialize
from .unet import Block, Parameter, Plan, check_parameters, plan

__all__ = [
    "GROUP_NORM_EPS",
    "Block",
    "NetworkConfig",
    "Parameter",
    "Plan",
    "activation_count",
    "check_parameters",
    "initialize",
    "multiply_adds",
    "parameter_count",
    "plan",
]
