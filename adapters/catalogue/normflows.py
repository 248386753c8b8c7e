"""normflows' layers in the catalogue.

normflows runs noise → data, and lists the layer at the noise side first, as the specification lists its masks.
"""

from collections.abc import Sequence

import torch
from nflows.transforms import CompositeTransform, ReversePermutation, Transform
from torch import Tensor, nn

from adapters.bridges import as_transform
from adapters.catalogue.specification import NativeFlow, Specification
from adapters.flow import ContextAsCoordinates
from adapters.networks import ACTIVATIONS, MLP


def affine(specification: Specification) -> Transform:
    """``MaskedAffineFlow``: two full-width networks in each layer. It starts at the identity.

    The scale exp(s) has no bound. The library's layer takes no context. Here the context is given to it as further
    coordinates that it leaves unchanged.
    """
    from normflows.flows import Composite, MaskedAffineFlow

    features, context_features = specification.features, specification.context_features or 0

    def network() -> nn.Module:
        mlp = MLP(features + context_features, features, specification.hidden_features, None, specification.activation)
        return mlp.append(nn.ConstantPad1d((0, context_features), 0.0)) if context_features else mlp

    layers = [
        MaskedAffineFlow(torch.cat((mask, mask.new_ones(context_features))), t=network(), s=network())
        for mask in specification.coupling_masks
    ]
    transform = as_transform(Composite(layers))
    return ContextAsCoordinates(transform, features, context_features) if context_features else transform


def rqs(specification: Specification, bins: int = 8, tail_bound: float = 4.0) -> nn.Module:
    """The coupling inside ``CoupledRationalQuadraticSpline``, with linear tails, under our masks and networks.

    As in that class, the unchanged coordinates go through a spline, too, whose parameters depend on no input. The
    library's class has the alternating mask only, residual networks of one width, and a tail bound of 3.
    """
    from normflows.flows import Composite, Reverse
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    def network(in_features: int, out_features: int) -> MLP:
        return MLP(in_features, out_features, **specification.network)

    layers = [
        PiecewiseRationalQuadraticCoupling(
            1 - mask,  # normflows' spline couplings mark the transformed coordinates by 1
            network,
            num_bins=bins,
            tails="linear",
            tail_bound=tail_bound,
            apply_unconditional_transform=True,
        )
        for mask in specification.coupling_masks
    ]
    return Composite([Reverse(layer) for layer in layers])


def maf(specification: Specification) -> Transform:
    """``MaskedAffineAutoregressive``, turned round so that log_prob is the fast direction.

    In the library's own direction, sampling is fast. Before each layer the order of the coordinates is reversed. The
    scale, data → noise, is σ(· + 2) + 0.001, which is at most 1.001. The network, a MADE, has residual blocks of one
    width: one block for each hidden width.
    """
    from normflows.flows import MaskedAffineAutoregressive, Reverse

    width, layers = specification.one_hidden_width, []
    for _ in range(specification.layers):
        layer = MaskedAffineAutoregressive(
            specification.features,
            width,
            context_features=specification.context_features,
            num_blocks=len(specification.hidden_features),
            activation=ACTIVATIONS[specification.activation](),
        )
        layers += [ReversePermutation(specification.features), as_transform(Reverse(layer))]
    return CompositeTransform(layers)


FLOWS = {"normflows-affine": affine, "normflows-rqs": rqs, "normflows-maf": maf}


def native_masked_affine(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    from normflows.flows import MaskedAffineFlow

    def network() -> MLP:
        return MLP(features, features, hidden_features)

    return _native(features, [MaskedAffineFlow(mask, network(), network()) for mask in masks])


def native_coupling_block(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    """``AffineCouplingBlock`` and a swap of the halves in turn, as in the library's own example."""
    from normflows.flows import AffineCouplingBlock, Permute

    half, layers = (features + 1) // 2, []
    for _ in masks:
        network = MLP(half, 2 * (features - half), hidden_features)
        layers += [AffineCouplingBlock(network), Permute(features, mode="swap")]
    return _native(features, layers)


def _native(features: int, layers: list[nn.Module]) -> NativeFlow:
    from normflows import NormalizingFlow
    from normflows.distributions import DiagGaussian

    flow = NormalizingFlow(DiagGaussian(features, trainable=False), layers)
    return NativeFlow(flow, flow.log_prob, flow.sample, list(flow.parameters()))


NATIVE_FLOWS = {"normflows MaskedAffine": native_masked_affine, "normflows CouplingBlock": native_coupling_block}
