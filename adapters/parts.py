"""What nflows' own classes are made of: it keeps the parts under private names, which are used nowhere but here."""

from collections.abc import Sequence
from typing import Any

import torch
from nflows.distributions import Distribution
from nflows.distributions.mixture import MADEMoG
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from torch import nn


def transform_of(flow: Flow) -> Transform:
    """The transform of a flow, data → noise."""
    return flow._transform


def base_of(flow: Flow) -> Distribution:
    """The base distribution of a flow, which the noise follows."""
    return flow._distribution


def embedding_of(flow: Flow) -> nn.Module:
    """The network that maps a flow's context before the layers get it; ``nn.Identity`` if they get it as it is."""
    return flow._embedding_net


def parts_of(composite: CompositeTransform) -> Sequence[Transform]:
    """The transforms in a composite, of which the first runs first in ``forward``."""
    parts: Any = composite._transforms  # a ModuleList, whose entries are modules as far as type checkers know
    return parts


def inner_of(inverse: InverseTransform) -> Transform:
    """The transform whose inverse this is."""
    return inverse._transform


def noise_shape_of(base: Distribution) -> torch.Size | None:
    """The shape of one sample of a base distribution; ``None`` if the distribution has no attribute for it."""
    shapes = (getattr(base, name, None) for name in ("_shape", "shape"))
    return next((torch.Size(shape) for shape in shapes if isinstance(shape, tuple | list)), None)


def event_shape_of(flow: Flow) -> torch.Size | None:
    """The shape of one datum: the flow's ``event_shape``, or else that of its noise; ``None`` if neither is known."""
    shape = getattr(flow, "event_shape", None)
    return noise_shape_of(base_of(flow)) if shape is None else torch.Size(shape)


def context_width_of(base: MADEMoG) -> int | None:
    """Width of the context that nflows' autoregressive mixture reads; ``None`` if it reads none."""
    layer = getattr(base._made, "context_layer", None)
    return None if layer is None else layer.in_features
