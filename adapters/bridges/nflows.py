"""nflows: its transforms and flows are what all others are turned into, so there is nothing to convert."""

import weakref
from typing import Any

import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from nflows.transforms.nonlinearities import GatedLinearUnit
from torch import Tensor, nn

from adapters.bridges.common.exports import EventDim
from adapters.flow import StandardNormal
from adapters.parts import base_of

PACKAGES = LIBRARIES = ("nflows",)
DISTRIBUTION = "nflows"
EXTRA = None

_checked = weakref.WeakSet()  # modules that have been searched for wrong layers already


def transform_in(foreign: Any) -> Transform | None:
    """nflows' own, as it is.

    Raises:
        ValueError: for one whose log-determinant is wrong.
    """
    if not isinstance(foreign, Transform):
        return None
    _check_exact(foreign)
    return foreign


def flow_in(foreign: Any) -> Flow | None:
    """nflows' own, as it is.

    Raises:
        TypeError: for one with a base of torch's: nflows' ``Flow`` takes it, and then fails in every call.
        ValueError: for one whose log-determinant is wrong.
    """
    if not isinstance(foreign, Flow):
        return None
    base = base_of(foreign)
    if isinstance(base, torch.distributions.Distribution):
        raise TypeError(
            f"the base of this flow, {type(base).__name__}, is a torch distribution, not one of nflows'; use "
            "as_flow(TransformedDistribution(base, [to_library('torch', transform)]))"
        )
    _check_exact(foreign)
    return foreign


def _check_exact(module: nn.Module) -> None:
    """Raise a ValueError for a module that contains a layer with a wrong log-determinant."""
    if module not in _checked and any(isinstance(part, GatedLinearUnit) for part in module.modules()):
        raise ValueError(
            "nflows' GatedLinearUnit is no layer of a flow: its log-determinant counts the gate once, not once for "
            "each coordinate"
        )
    _checked.add(module)


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> Transform:
    """The transform itself."""
    return transform


def native_log_prob(exported: Transform, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of nflows' own ``Flow`` with a standard normal base."""
    return Flow(exported, StandardNormal(inputs.shape[1:])).log_prob(inputs, context)
