"""Our own layers."""

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.layers.autoregressive import AutoregressiveMLP, MaskedAutoregressiveLayer
from adapters.layers.coupling import MaskedCouplingLayer
from adapters.layers.histogram import MaskedHistogramCouplingLayer
from adapters.layers.packed import PackedAffineCouplingLayer, PackedComposite
from adapters.layers.spline import MaskedSplineCouplingLayer, spline_parameters
from adapters.masks import checkerboard_mask, random_mask
from adapters.networks import MLP, ConvNet
from tests.examples import Example


def _histogram(mask: list[int], bins: int, context_features: int | None = None, edges: Tensor | None = None) -> Example:
    mask = torch.tensor(mask)
    edges = torch.linspace(0, 1, bins + 1)[1:-1] if edges is None else edges

    def make() -> Transform:
        network = MLP(int(mask.sum()), bins * int((1 - mask).sum()), context_features=context_features)
        return MaskedHistogramCouplingLayer(network, mask, edges)

    return Example(make, (len(mask),), context_features)


EXAMPLES = {
    "textbook": Example(lambda: MaskedCouplingLayer(MLP(5, 5), MLP(5, 5), checkerboard_mask(5)), (5,)),
    "textbook-image": Example(
        lambda: MaskedCouplingLayer(
            nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), checkerboard_mask(2, 3, 4)
        ),
        (2, 3, 4),
    ),
    "textbook-context": Example(
        lambda: MaskedCouplingLayer(
            MLP(3, 3, context_features=2), MLP(3, 3, context_features=2), torch.tensor([0, 1, 0])
        ),
        (3,),
        context_features=2,
    ),
    "packed": Example(lambda: PackedAffineCouplingLayer(MLP(3, 4), checkerboard_mask(5)), (5,)),
    "packed-unbounded": Example(lambda: PackedAffineCouplingLayer(MLP(3, 6), random_mask(6), scale_bound=None), (6,)),
    "packed-image": Example(lambda: PackedAffineCouplingLayer(MLP(6, 12), checkerboard_mask(1, 3, 4)), (1, 3, 4)),
    "packed-conv": Example(
        lambda: PackedAffineCouplingLayer(
            ConvNet(checkerboard_mask(4, 4), 1 - checkerboard_mask(4, 4), 2, (4,), 3, "tanh"), checkerboard_mask(4, 4)
        ),
        (4, 4),
        context_features=3,
    ),
    "packed-composite": Example(
        lambda: PackedComposite(
            PackedAffineCouplingLayer(MLP(int(mask.sum()), 2 * int((1 - mask).sum()), context_features=2), mask)
            for mask in (checkerboard_mask(1, 1, 5), 1 - checkerboard_mask(1, 1, 5), checkerboard_mask(1, 1, 5))
        ),
        (1, 1, 5),
        context_features=2,
    ),
    "packed-context": Example(
        lambda: PackedAffineCouplingLayer(MLP(1, 4, context_features=2), torch.tensor([0, 1, 0])),
        (3,),
        context_features=2,
    ),
    "spline": Example(lambda: MaskedSplineCouplingLayer(MLP(3, 2 * spline_parameters(8)), checkerboard_mask(5)), (5,)),
    "spline-context": Example(
        lambda: MaskedSplineCouplingLayer(
            MLP(2, 2 * spline_parameters(4), context_features=3), torch.tensor([0, 1, 0, 1]), bins=4, tail_bound=1.5
        ),
        (4,),
        context_features=3,
    ),
    "spline-1d": Example(
        lambda: MaskedSplineCouplingLayer(MLP(0, 11, context_features=1), torch.zeros(1), bins=4), (1,), 1
    ),
    "autoregressive": Example(lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.arange(5))), (5,)),
    "autoregressive-order": Example(
        lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.tensor([2, 0, 3, 1]), 2, (6, 2), None, "tanh"), 0.5),
        (4,),
    ),
    "autoregressive-context": Example(
        lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.tensor([1, 0, 2]), context_features=2)), (3,), 2
    ),
    "autoregressive-1d": Example(
        lambda: MaskedAutoregressiveLayer(AutoregressiveMLP(torch.zeros(1).long(), context_features=3)), (1,), 3
    ),
    "histogram": _histogram([1, 0, 1, 0, 0], bins=6),
    "histogram-context": _histogram([0, 1, 0], bins=4, context_features=2),
    "histogram-edges": _histogram([0, 1], bins=3, edges=torch.tensor([[0.1, 0.7], [0.5, 0.6]])),
}
