"""nflows: the hub itself, so nothing to convert; its own coupling and autoregressive layers for the catalogue.

nflows applies a layer's ``forward`` data → noise and marks the *transformed* coordinates by 1; ``nflows_mask`` turns
our masks over, here and nowhere else.
"""

import weakref

import torch
from nflows import transforms
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, Transform
from nflows.transforms.nonlinearities import GatedLinearUnit
from torch import Tensor, nn

from adapters.finite import finite_rows
from adapters.flow import StandardNormal
from adapters.networks import ACTIVATIONS, MLP
from adapters.registry import Specification


class RationalQuadraticCoupling(transforms.PiecewiseRationalQuadraticCouplingTransform):
    """nflows' own, whose inverse asserts something of the whole batch, which NaN and ±inf in one row make false."""

    inverse = finite_rows(transforms.PiecewiseRationalQuadraticCouplingTransform.inverse)


def nflows_mask(mask: Tensor) -> Tensor:
    """Our mask (1 = unchanged) as nflows means it (1 = transformed)."""
    return 1 - mask


def affine(specification: Specification) -> Transform:
    """``AffineCouplingTransform``. Its scale, data → noise, is σ(· + 2) + 0.001: at most 1.001."""
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

    A residual network has one width and two linear layers a block: one block for each hidden width, all equal.
    """
    return _couplings(specification, transforms.AffineCouplingTransform, network=_residual_network)


def maf(specification: Specification) -> Transform:
    """``MaskedAffineAutoregressiveTransform`` after a reversal each, as ``MaskedAutoregressiveFlow``: fast log_prob.

    Its MADE has one width, and one residual block for each hidden width.
    """
    layers = []
    for _ in range(specification.layers):
        layers.append(transforms.ReversePermutation(specification.features))
        layers.append(
            transforms.MaskedAffineAutoregressiveTransform(
                specification.features,
                hidden_features=_one_width(specification),
                context_features=specification.context_features,
                num_blocks=len(specification.hidden_features),
                activation=ACTIVATIONS[specification.activation](),
            )
        )
    return CompositeTransform(layers)


def _couplings(specification: Specification, coupling: type, network=None, **options) -> Transform:
    """Coupling layers under the specification's masks, data side first as nflows lists them."""

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
        hidden_features=_one_width(specification),
        context_features=specification.context_features,
        num_blocks=len(specification.hidden_features),
        activation=ACTIVATIONS[specification.activation](),
    )


def _one_width(specification: Specification) -> int:
    if len(set(specification.hidden_features)) != 1:
        raise ValueError(f"this network has one hidden width, so {specification.hidden_features} must all be equal")
    return specification.hidden_features[0]


PACKAGES = LIBRARIES = ("nflows",)
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
    base = thing._distribution
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


FLOWS = {"nflows-affine": affine, "nflows-rqs": rqs, "nflows-realnvp": realnvp, "nflows-maf": maf}
EXAMPLES, MODELS = {}, {}
