"""Our own layers in the catalogue."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from nflows.transforms import CompositeTransform, InverseTransform, Transform
from torch import Tensor, nn

from adapters.catalogue.specification import Specification
from adapters.checks import check_bins
from adapters.layers.autoregressive import AutoregressiveMLP, MaskedAutoregressiveLayer
from adapters.layers.coupling import MaskedCouplingLayer
from adapters.layers.histogram import MaskedHistogramCouplingLayer
from adapters.layers.packed import PackedAffineCouplingLayer, PackedComposite, PackedCoupling
from adapters.layers.spline import MaskedSplineCouplingLayer, spline_parameters
from adapters.networks import MAX_INPUT, MLP, conditioner, within
from adapters.preprocess import Marginals


def packed_flow(
    specification: Specification,
    layer: Callable[..., PackedCoupling],
    parameters_per_coordinate: int,
    net: str = "mlp",
    dropout: float = 0.0,
    reads: Iterable[Tensor] | None = None,
) -> Transform:
    """A stack of packed coupling layers under the specification's masks, as a transform data → noise.

    Args:
        layer: makes one layer, ``layer(conditioner, mask, reads=…)``.
        parameters_per_coordinate: how many numbers the layer takes for each coordinate that it transforms.
        net, dropout: of the conditioners; see ``networks.conditioner``.
        reads: one for each layer; see ``PackedCoupling``. By default each layer reads all unchanged coordinates.
    """
    masks = specification.coupling_masks
    reads = [torch.ones_like(mask) for mask in masks] if reads is None else reads
    network = dict(specification.network, dropout=dropout)
    layers = [
        layer(conditioner(net, mask * readable, 1 - mask, parameters_per_coordinate, **network), mask, reads=readable)
        for mask, readable in zip(masks, reads, strict=True)
    ]
    return InverseTransform(PackedComposite(layers))


def masked_affine(
    specification: Specification, scale_bound: float | None = 2.0, net: str = "mlp", dropout: float = 0.0
) -> Transform:
    """Packed affine coupling layers: equations 15 to 17, fast."""
    layer = partial(PackedAffineCouplingLayer, scale_bound=scale_bound)
    return packed_flow(specification, layer, PackedAffineCouplingLayer.parameters_per_coordinate, net, dropout)


class BoundedMLP(MLP):
    """An ``MLP`` whose input is clamped, so that none of its sums overflows: see ``networks.within``."""

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(within(input, MAX_INPUT), context)


def masked_affine_textbook(specification: Specification) -> Transform:
    """The exercise's own layers: two full-width networks, tanh at the end of the scale network."""

    def network() -> BoundedMLP:
        return BoundedMLP(specification.features, specification.features, **specification.network)

    layers = [
        MaskedCouplingLayer(network().append(nn.Tanh()), network(), mask) for mask in specification.coupling_masks
    ]
    return InverseTransform(CompositeTransform(layers))


def masked_spline(
    specification: Specification,
    bins: int = 8,
    tail_bound: float = 4.0,
    minimum: float = 1e-3,
    net: str = "mlp",
    dropout: float = 0.0,
) -> Transform:
    """Packed rational-quadratic spline coupling layers."""
    layer = partial(MaskedSplineCouplingLayer, bins=bins, tail_bound=tail_bound, minimum=minimum)
    return packed_flow(specification, layer, spline_parameters(check_bins(bins)), net, dropout)


def masked_autoregressive(specification: Specification, scale_bound: float = 2.0, dropout: float = 0.0) -> Transform:
    """Masked autoregressive affine layers, whose log_prob is fast. They have no masks to choose.

    The layers take the coordinates in ascending and in descending order by turns.
    """
    ascending = torch.arange(specification.features, device="cpu")  # on the meta device it would have no values
    networks = [
        AutoregressiveMLP(ascending.flip(0) if i % 2 else ascending, dropout=dropout, **specification.network)
        for i in range(specification.layers)
    ]
    layers = [MaskedAutoregressiveLayer(network, scale_bound) for network in networks]
    return InverseTransform(CompositeTransform(layers))


def masked_histogram(specification: Specification, bins: int = 16, net: str = "mlp", dropout: float = 0.0) -> Transform:
    """Packed histogram coupling layers.

    If the masks transform each coordinate just once, as ``masks.pyramid_masks`` do, a conditioner reads only those
    coordinates that no layer has transformed yet on the way from data to noise. If ``preprocess`` is ``Marginals``, the
    bins are groups of its levels. Otherwise they are equally wide.
    """
    bins = check_bins(bins)
    marginals = specification.preprocess
    if isinstance(marginals, Marginals):
        edges = marginals.edges(bins)
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")[1:-1]
    masks = specification.coupling_masks
    reads = None
    if (1 - torch.stack(masks)).sum(0).eq(1).all():
        untransformed = torch.stack([torch.ones_like(masks[0]), *reversed(masks)]).cumprod(0)  # from the data side on
        reads = untransformed[:-1].flip(0)
    layer = partial(MaskedHistogramCouplingLayer, edges=edges)
    return packed_flow(specification, layer, edges.shape[-1] + 1, net, dropout, reads)


FLOWS = {
    "masked-affine": masked_affine,
    "masked-affine-textbook": masked_affine_textbook,
    "masked-autoregressive": masked_autoregressive,
    "masked-histogram": masked_histogram,
    "masked-spline": masked_spline,
}
