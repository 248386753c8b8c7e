"""nflows' own coupling and autoregressive layers in the catalogue.

nflows applies a layer's ``forward`` data → noise, and lists the layer at the data side first. Its masks mark the
*transformed* coordinates by 1. ``nflows_mask`` translates ours, here and nowhere else.
"""

from collections.abc import Sequence

from nflows import transforms
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor

from adapters.catalogue.specification import NativeFlow, Specification
from adapters.finite import finite_rows
from adapters.flow import StandardNormal
from adapters.networks import ACTIVATIONS, MLP


class RationalQuadraticCoupling(transforms.PiecewiseRationalQuadraticCouplingTransform):
    """nflows' own layer, whose inverse asserts something about the whole batch, and would fail if one row is NaN."""

    inverse = finite_rows(transforms.PiecewiseRationalQuadraticCouplingTransform.inverse)


def nflows_mask(mask: Tensor) -> Tensor:
    """Our mask (1 = unchanged) as nflows means it (1 = transformed)."""
    return 1 - mask


def affine(specification: Specification) -> Transform:
    """``AffineCouplingTransform``. Its scale, data → noise, is σ(· + 2) + 0.001, which is at most 1.001."""
    return _couplings(specification, transforms.AffineCouplingTransform)


def rqs(specification: Specification, bins: int = 8, tail_bound: float = 4.0, minimum: float = 1e-3) -> Transform:
    """``PiecewiseRationalQuadraticCouplingTransform`` with linear tails."""
    return _couplings(
        specification,
        RationalQuadraticCoupling,
        num_bins=bins,
        tails="linear",
        tail_bound=tail_bound,
        min_bin_width=minimum,
        min_bin_height=minimum,
        min_derivative=minimum,
    )


def realnvp(specification: Specification) -> Transform:
    """The layers of ``SimpleRealNVP``: affine couplings whose conditioners are nflows' residual networks.

    A residual network has blocks of two linear layers, all of one width. It gets one block for each hidden width, and
    the hidden widths must all be equal.
    """
    return _couplings(specification, transforms.AffineCouplingTransform, network=_residual_network)


def maf(specification: Specification) -> Transform:
    """``MaskedAffineAutoregressiveTransform``, as in nflows' ``MaskedAutoregressiveFlow``. Its log_prob is fast.

    Before each layer the order of the coordinates is reversed. Its network, a MADE, has residual blocks of one width:
    one block for each hidden width.
    """
    layers = []
    for _ in range(specification.layers):
        layers.append(transforms.ReversePermutation(specification.features))
        layers.append(
            transforms.MaskedAffineAutoregressiveTransform(
                specification.features,
                hidden_features=specification.one_hidden_width,
                context_features=specification.context_features,
                num_blocks=len(specification.hidden_features),
                activation=ACTIVATIONS[specification.activation](),
            )
        )
    return CompositeTransform(layers)


def _couplings(specification: Specification, coupling: type, network=None, **options) -> Transform:
    """Coupling layers under the specification's masks, with the data side first, as nflows lists layers."""

    def conditioner(in_features: int, out_features: int):
        return (network or _mlp)(in_features, out_features, specification)

    return CompositeTransform(
        coupling(nflows_mask(mask), conditioner, **options) for mask in reversed(specification.coupling_masks)
    )


def _mlp(in_features: int, out_features: int, specification: Specification) -> MLP:
    return MLP(in_features, out_features, **specification.network)


def _residual_network(in_features: int, out_features: int, specification: Specification) -> ResidualNet:
    return ResidualNet(
        in_features,
        out_features,
        hidden_features=specification.one_hidden_width,
        context_features=specification.context_features,
        num_blocks=len(specification.hidden_features),
        activation=ACTIVATIONS[specification.activation](),
    )


FLOWS = {"nflows-affine": affine, "nflows-rqs": rqs, "nflows-realnvp": realnvp, "nflows-maf": maf}


def native_affine(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    layers = [
        transforms.AffineCouplingTransform(nflows_mask(mask), lambda i, o: MLP(i, o, hidden_features)) for mask in masks
    ]
    flow = Flow(CompositeTransform(layers), StandardNormal([features]))
    return NativeFlow(flow, flow.log_prob, flow.sample, list(flow.parameters()))


NATIVE_FLOWS = {"nflows AffineCoupling": native_affine}
