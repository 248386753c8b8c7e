"""Pyro's couplings and autoregressive layers in the catalogue.

Pyro runs noise → data, and lists the layer at the noise side first, as the specification lists its masks.
"""

from collections.abc import Callable, Sequence

import torch
from nflows.transforms import Transform
from pyro.distributions import (
    TransformedDistribution,  # pyright: ignore[reportAttributeAccessIssue]  # made by a loop
    transforms,
)
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.distributions.torch_transform import ComposeTransformModule
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from adapters.bridges import as_transform
from adapters.catalogue.specification import NativeFlow, Specification
from adapters.flow import ContextAsCoordinates
from adapters.masks import check_mask
from adapters.networks import ACTIVATIONS


def affine(specification: Specification):
    """``AffineCoupling``. Its log-scale, noise → data, is clamped to [−5, 3].

    Gradients pass through the clamp as if there were none. The library's coupling leaves the first coordinates
    unchanged. Here a ``Permute`` before it and the inverse one after it make it follow any mask. Its networks,
    ``DenseNN``, start at random weights, not at the identity.
    """
    context = specification.context_features

    def coupling(unchanged: int, transformed: int):
        network = _network(specification, unchanged, [transformed, transformed], context)
        return (transforms.ConditionalAffineCoupling if context else transforms.AffineCoupling)(unchanged, network)

    return _composed(specification, _couplings(specification, coupling))


def spline(specification: Specification, bins: int = 8, tail_bound: float = 4.0, order: str = "quadratic") -> Transform:
    """``SplineCoupling`` with rational-quadratic splines, or rational-linear ones, the library's default.

    Outside [−tail_bound, tail_bound] the splines are the identity. Bins are at least 0.001 of that interval wide and
    high, and slopes are at least 0.001. As in ``affine``, permutations make the layer follow any mask, and its networks
    start at random weights. The coordinates that a mask leaves unchanged stay so (``identity=True``), as in the other
    libraries' couplings. The library's layer takes no context. Here the context is given to it as further coordinates
    that it leaves unchanged.
    """
    if order not in ("linear", "quadratic"):
        raise ValueError(f"order must be 'linear' or 'quadratic', not {order!r}")
    features, context_features = specification.features, specification.context_features or 0

    def coupling(unchanged: int, transformed: int):
        widths = [bins, bins, bins - 1, bins][: 3 if order == "quadratic" else 4]
        network = _network(specification, unchanged, [transformed * width for width in widths])
        width = unchanged + transformed
        layer = transforms.SplineCoupling(width, unchanged, network, bins, tail_bound, order, identity=True)
        del layer.lower_spline  # the spline of the unchanged coordinates, which identity=True never uses
        return layer

    transform = as_transform(ComposeTransformModule(_couplings(specification, coupling, context_features)))
    return ContextAsCoordinates(transform, features, context_features) if context_features else transform


def maf(specification: Specification):
    """``AffineAutoregressive``, turned round so that log_prob is the fast direction.

    In the library's own direction, sampling is fast. Before each layer the order of the coordinates is reversed. The
    log-scale, data → noise, is clamped to [−5, 3], and gradients pass through the clamp as if there were none. Its
    network, ``AutoRegressiveNN``, starts at random weights. Its hidden layers must be at least as wide as the data.
    """
    features, widths = specification.features, list(specification.hidden_features)
    if not widths or min(widths) < features:
        raise ValueError(
            f"Pyro's autoregressive network takes hidden layers no narrower than the {features} features, not {widths}"
        )
    if features == 1:
        raise ValueError("Pyro's autoregressive network takes at least 2 features, not 1; nflows-maf takes 1")
    options = {"permutation": torch.arange(features), "nonlinearity": ACTIVATIONS[specification.activation]()}
    parts = []
    for _ in range(specification.layers):
        if specification.context_features:
            network = ConditionalAutoRegressiveNN(features, specification.context_features, widths, **options)
            layer = transforms.ConditionalAffineAutoregressive(network)
        else:
            layer = transforms.AffineAutoregressive(AutoRegressiveNN(features, widths, **options))
        parts += [layer.inv, transforms.Permute(torch.arange(features).flip(0))]
    return _composed(specification, parts)


def _couplings(specification: Specification, coupling: Callable, context_features: int = 0) -> list:
    """Couplings that leave the first coordinates unchanged, each between permutations that make it follow its mask.

    If ``context_features`` is given, so many coordinates are added to each mask, which it leaves unchanged.
    """
    parts = []
    for mask in specification.coupling_masks:
        check_mask(mask)
        mask = torch.cat((mask, mask.new_ones(context_features)))
        unchanged, transformed = (mask == 1).nonzero().flatten(), (mask == 0).nonzero().flatten()
        order = torch.cat((unchanged, transformed))
        parts += [
            transforms.Permute(order),
            coupling(len(unchanged), len(transformed)),
            transforms.Permute(order.argsort()),
        ]
    return parts


def _composed(specification: Specification, parts: list):
    """The parts, listed from the noise side on, as one transform of Pyro's."""
    return (ConditionalComposeTransformModule if specification.context_features else ComposeTransformModule)(parts)


def _network(specification: Specification, in_features: int, widths: list[int], context: int | None = None):
    if not specification.hidden_features:
        raise ValueError("Pyro's networks take at least one hidden layer, but hidden_features is empty")
    hidden, activation = list(specification.hidden_features), ACTIVATIONS[specification.activation]()
    if context:
        return ConditionalDenseNN(in_features, context, hidden, widths, activation)
    return DenseNN(in_features, hidden, widths, activation)


FLOWS = {"pyro-affine": affine, "pyro-spline": spline, "pyro-maf": maf}


def native_affine(features: int, masks: Sequence[Tensor], hidden_features: tuple[int, ...]) -> NativeFlow:
    parts = []
    for _ in masks:
        coupling = transforms.affine_coupling(features, hidden_dims=list(hidden_features))
        weight = next(coupling.nn.layers[-1].parameters())
        nn.init.zeros_(weight)  # as the other libraries' flows here; with Pyro's own weights 64 layers overflow
        parts += [coupling, transforms.Permute(torch.arange(features).flip(0))]
    base = Independent(Normal(torch.zeros(features), torch.ones(features)), 1)
    flow = TransformedDistribution(base, parts)

    def log_prob(x: Tensor) -> Tensor:
        flow.clear_cache()  # as every training loop in Pyro has to do
        return flow.log_prob(x)

    modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    return NativeFlow(flow, log_prob, lambda n: flow.sample((n,)), list(modules.parameters()))


NATIVE_FLOWS = {"Pyro AffineCoupling": native_affine}
