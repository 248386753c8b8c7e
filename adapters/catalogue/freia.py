"""FrEIA's affine coupling in the catalogue."""

from collections.abc import Sequence

import torch
from nflows.transforms import CompositeTransform, Permutation, Transform
from torch import Tensor

from adapters.bridges import as_transform
from adapters.catalogue.specification import NativeFlow, Specification
from adapters.flow import StandardNormal
from adapters.networks import MLP


def affine(specification: Specification, clamp: float = 2.0) -> Transform:
    """``AffineCouplingOneSided`` under our masks and networks.

    FrEIA's block leaves the first coordinates unchanged. Here a permutation before each block puts the coordinates that
    the mask leaves unchanged first, and another one after it puts them back. The scale is exp(clamp · 0.636 · atan s),
    which lies within e^±clamp.
    """
    from FrEIA.modules import AffineCouplingOneSided

    def network(in_features: int, out_features: int) -> MLP:
        return MLP(in_features, out_features, specification.hidden_features, None, specification.activation)

    dims_c = [(specification.context_features,)] if specification.context_features else []
    layers = []
    for mask in reversed(specification.coupling_masks):
        order = torch.argsort(mask, descending=True, stable=True)
        block = AffineCouplingOneSided(
            [(specification.features,)], dims_c, network, clamp=clamp, split_len=int(mask.sum())
        )
        layers += [Permutation(order), as_transform(block), Permutation(torch.argsort(order))]
    return CompositeTransform(layers)


FLOWS = {"freia-affine": affine}


def native_rnvp(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import RNVPCouplingBlock

    flow = SequenceINN(features)
    for _ in masks:
        flow.append(RNVPCouplingBlock, subnet_constructor=lambda i, o: MLP(i, o, hidden_features))
    base = StandardNormal([features])

    def log_prob(x: Tensor) -> Tensor:
        noise, log_det = flow(x)
        return base.log_prob(noise) + log_det

    return NativeFlow(flow, log_prob, lambda n: flow(base.sample(n), rev=True)[0], list(flow.parameters()))


NATIVE_FLOWS = {"FrEIA RNVP": native_rnvp}
