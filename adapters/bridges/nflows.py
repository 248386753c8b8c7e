"""nflows: the hub itself, so nothing to convert."""

import weakref

import torch
from nflows.flows import Flow
from nflows.transforms import Transform
from nflows.transforms.nonlinearities import GatedLinearUnit
from torch import Tensor, nn

from adapters.flow import StandardNormal
from adapters.parts import base_of

PACKAGES = LIBRARIES = ("nflows",)
DISTRIBUTION = "nflows"
EXTRA = None


_checked = weakref.WeakSet()  # so that each flow is searched once


def transform_in(thing) -> Transform | None:
    """nflows' own, as it is.

    Raises:
        ValueError: for one whose log-determinant is wrong.
    """
    if not isinstance(thing, Transform):
        return None
    _check_exact(thing)
    return thing


def flow_in(thing) -> Flow | None:
    """nflows' own, as it is.

    Raises:
        TypeError: for one with a base of torch's: nflows' ``Flow`` takes it, and then fails in every call.
        ValueError: for one whose log-determinant is wrong.
    """
    if not isinstance(thing, Flow):
        return None
    base = base_of(thing)
    if isinstance(base, torch.distributions.Distribution):
        raise TypeError(
            f"the base of this flow, {type(base).__name__}, is a torch distribution, not one of nflows'; use "
            "as_flow(TransformedDistribution(base, [to_library('torch', transform)]))"
        )
    _check_exact(thing)
    return thing


def _check_exact(thing: nn.Module) -> None:
    if thing not in _checked and any(isinstance(part, GatedLinearUnit) for part in thing.modules()):
        raise ValueError(
            "nflows' GatedLinearUnit is no layer of a flow: its log-determinant counts the gate once, not once for "
            "each coordinate"
        )
    _checked.add(thing)


def transform_out(transform: Transform, library: str, event_dim: int, conditional: bool) -> Transform:
    """The transform itself."""
    return transform


def native_log_prob(exported: Transform, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """Of nflows' own ``Flow``."""
    return Flow(exported, StandardNormal(inputs.shape[1:])).log_prob(inputs, context)
