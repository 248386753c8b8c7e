"""Hand-written and library normalizing flows side by side: every flow is an nflows ``Transform`` or ``Flow``."""

from adapters.bridges import as_flow, as_transform, to_library
from adapters.catalogue import build_flow, flow_names
from adapters.check import check
from adapters.checkpoint import load_flow, save_flow
from adapters.distribution import FlowDistribution
from adapters.layers.coupling import MaskedCouplingLayer
from adapters.masks import checkerboard_mask, half_mask, random_mask

__all__ = [
    "FlowDistribution",
    "MaskedCouplingLayer",
    "as_flow",
    "as_transform",
    "build_flow",
    "check",
    "checkerboard_mask",
    "flow_names",
    "half_mask",
    "load_flow",
    "random_mask",
    "save_flow",
    "to_library",
]
