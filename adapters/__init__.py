"""Hand-written and library normalizing flows side by side: every flow is an nflows ``Transform`` or ``Flow``."""

import importlib
from typing import TYPE_CHECKING, Any

from adapters import imports

imports.import_nflows()

from adapters.bridges import as_flow, as_transform, to_library
from adapters.catalogue import build_flow, flow_names
from adapters.check import check
from adapters.checkpoint import load_flow, save_flow
from adapters.layers.coupling import MaskedCouplingLayer
from adapters.masks import checkerboard_mask, half_mask, random_mask

if TYPE_CHECKING:
    from adapters.distribution import FlowDistribution

__version__ = "0.1.0"

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

LATER = {"FlowDistribution": "adapters.distribution"}  # by name, the modules that bring Pyro or matplotlib with them


def __getattr__(name: str) -> Any:
    """A name that is imported when it is first asked for."""
    if name not in LATER:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
