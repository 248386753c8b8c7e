"""normflows: its flow layers and its whole models in, any transform out.

normflows runs noise → data and lists the noise side first, the opposite of nflows. Its context has the shape
``(batch, width)``; a class-conditional base takes the one-hot class as its context.

The work is done in ``normflows_parts``, whose files import normflows. They are imported in the functions below, so that
normflows is imported only when it is asked for.
"""

from typing import Any

from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.bridges.common.context import one_width
from adapters.bridges.common.exports import EventDim
from adapters.flow import Flow

PACKAGES = LIBRARIES = ("normflows",)
DISTRIBUTION = "normflows"
EXTRA = "normflows"


def transform_in(foreign: Any) -> Transform | None:
    """A flow layer, or layers in a ``Composite`` or a ``Reverse``; or an exported transform.

    Raises:
        ValueError: for layers that disagree on the width of the context; and as ``normflows_parts.layers``.
        InverseNotAvailable: as ``normflows_parts.layers.NormflowsLayer``.
    """
    from normflows import flows

    from adapters.bridges.normflows_parts.layers import NflowsLayer, chain, single_layers

    if not isinstance(foreign, flows.Flow):
        return None
    if isinstance(foreign, NflowsLayer):
        return foreign.transform
    layers = single_layers([foreign])
    width = one_width((layer.context_features for layer in layers), "the context of normflows layers")
    return chain(layers, conditional=width is not None)


def flow_in(foreign: Any) -> Flow | None:
    """A ``NormalizingFlow``, ``ConditionalNormalizingFlow``, ``ClassCondFlow`` or ``MultiscaleFlow``, with its base.

    Raises:
        ValueError: for ``GaussianPCA``, whose log_prob in normflows is not normalised; and as ``transform_in``.
        InverseNotAvailable: as ``transform_in``.
    """
    from normflows import ClassCondFlow, MultiscaleFlow, NormalizingFlow

    from adapters.bridges.normflows_parts.models import flow_of, multiscale_flow_of

    if isinstance(foreign, MultiscaleFlow):
        return multiscale_flow_of(foreign)
    return flow_of(foreign) if isinstance(foreign, NormalizingFlow | ClassCondFlow) else None


def transform_out(transform: Transform, library: str, event_dim: EventDim, conditional: bool) -> nn.Module:
    """A ``normflows.flows.Flow`` for ``NormalizingFlow`` and, with context, ``ConditionalNormalizingFlow``."""
    from adapters.bridges.normflows_parts.layers import NflowsLayer

    return NflowsLayer(transform)


def native_log_prob(exported: nn.Module, inputs: Tensor, context: Tensor | None = None) -> Tensor:
    """The log-density of a ``NormalizingFlow`` or, with a context, of a ``ConditionalNormalizingFlow``."""
    from normflows import ConditionalNormalizingFlow, NormalizingFlow
    from normflows.distributions import DiagGaussian

    base = DiagGaussian(tuple(inputs.shape[1:]), trainable=False).to(inputs)
    if context is None:
        return NormalizingFlow(base, [exported]).log_prob(inputs)
    return ConditionalNormalizingFlow(base, [exported]).log_prob(inputs, context)
