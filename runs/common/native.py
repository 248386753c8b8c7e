"""Each library's own affine coupling flow, built and scored as its authors would: no bridge in between.

Every function takes D, masks and hidden widths, and gives a ``Native``.
Libraries whose coupling knows halves only take the halves, whatever the masks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import nflows.flows
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from adapters.bridges.nflows import nflows_mask
from adapters.bridges.zuko import import_zuko
from adapters.flow import StandardNormal
from adapters.networks import MLP


class Native(NamedTuple):
    """A library's flow, its own log_prob and sample (of so many), and its parameters."""

    flow: Any
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Any]
    parameters: list[Tensor]


def normflows_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    from normflows.flows import MaskedAffineFlow

    layers = [MaskedAffineFlow(m, MLP(features, features, hidden), MLP(features, features, hidden)) for m in masks]
    return _normflows(features, layers)


def normflows_block(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    """``AffineCouplingBlock`` and a swap of the halves, the library's own example."""
    from normflows.flows import AffineCouplingBlock, Permute

    half, layers = (features + 1) // 2, []
    for _ in masks:
        layers += [AffineCouplingBlock(MLP(half, 2 * (features - half), hidden)), Permute(features, mode="swap")]
    return _normflows(features, layers)


def _normflows(features: int, layers: list[nn.Module]) -> Native:
    from normflows import NormalizingFlow
    from normflows.distributions import DiagGaussian

    flow = NormalizingFlow(DiagGaussian(features, trainable=False), layers)
    return Native(flow, flow.log_prob, flow.sample, list(flow.parameters()))


def zuko_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    flow = import_zuko().flows.RealNVP(features, transforms=len(masks), hidden_features=hidden)
    return Native(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)), list(flow.parameters()))


def pyro_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    import pyro.distributions as dist
    from pyro.distributions.transforms import Permute, affine_coupling

    transforms = []
    for _ in masks:
        coupling = affine_coupling(features, hidden_dims=list(hidden))
        nn.init.zeros_(coupling.nn.layers[-1].weight)  # as the others start; from Pyro's start, 64 layers overflow
        transforms += [coupling, Permute(torch.arange(features).flip(0))]
    base = Independent(Normal(torch.zeros(features), torch.ones(features)), 1)
    flow = dist.TransformedDistribution(base, transforms)

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()  # what every training loop in Pyro has to do
        return flow.log_prob(x)

    modules = nn.ModuleList(transform for transform in transforms if isinstance(transform, nn.Module))
    return Native(flow, log_prob, lambda n: flow.sample((n,)), list(modules.parameters()))


def freia_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import RNVPCouplingBlock

    flow = SequenceINN(features)
    for _ in masks:
        flow.append(RNVPCouplingBlock, subnet_constructor=lambda i, o: MLP(i, o, hidden))
    base = StandardNormal([features])

    def log_prob(x: Tensor) -> Tensor:
        noise, log_det = flow(x)
        return base.log_prob(noise) + log_det

    return Native(flow, log_prob, lambda n: flow(base.sample(n), rev=True)[0], list(flow.parameters()))


def nflows_flow(features: int, masks: list[Tensor], hidden: tuple[int, ...]) -> Native:
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    layers = [AffineCouplingTransform(nflows_mask(mask), lambda i, o: MLP(i, o, hidden)) for mask in masks]
    flow = nflows.flows.Flow(CompositeTransform(layers), StandardNormal([features]))
    return Native(flow, flow.log_prob, flow.sample, list(flow.parameters()))


NATIVE = {
    "nflows": nflows_flow,
    "normflows": normflows_flow,
    "zuko": zuko_flow,
    "pyro": pyro_flow,
    "freia": freia_flow,
}
