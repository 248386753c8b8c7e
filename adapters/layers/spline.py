"""Masked rational-quadratic spline coupling: Durkan et al. (2019), "Neural Spline Flows", section 3, under any mask."""

import math
from functools import partial

import torch
from nflows.transforms import Transform
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline
from torch import Tensor, nn
from torch.nn.functional import pad

from adapters.checks import check_positive
from adapters.layers.coupling import PackedCoupling, packed_flow
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from adapters.registry import Example, Specification


class MaskedSplineCouplingLayer(PackedCoupling):
    """z'_d = g_d(z_d) where b_d = 0, with g_d a monotone rational-quadratic spline whose knots are θ_d(z_{b=1}).

    On [−B, B] the spline has K bins; outside it is the identity. The knots are K widths, K heights (softmax) and K − 1
    inner derivatives (softplus), so θ_d has 3K − 1 entries; zeros give equal bins and unit derivatives: the identity.

    Args:
        conditioner: ``(batch, U)`` → ``(batch, (3K − 1) · T)``; see ``PackedCoupling``.
        mask: 1 = unchanged.
        bins: K.
        tail_bound: B, in units of the layer's input.
        minimum: smallest width and height of a bin, as a share of 2B, and smallest derivative. It limits how sharp an
            edge and how empty a gap in the density can be.
        reads: see ``PackedCoupling``.

    Raises:
        ValueError: as ``PackedCoupling``, and unless ``bins`` is at least 2 and the others positive.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        mask: Tensor,
        bins: int = 8,
        tail_bound: float = 4.0,
        minimum: float = 1e-3,
        reads: Tensor | None = None,
    ):
        check_positive(tail_bound=tail_bound, minimum=minimum)
        if bins < 2:
            raise ValueError(f"bins must be at least 2, not {bins}")
        super().__init__(conditioner, mask, reads)
        self.parameters_per_coordinate = spline_parameters(bins)
        self.bins = bins
        self.tail_bound = tail_bound
        self.minimum = minimum

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(z, parameters, inverse=False)

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(z, parameters, inverse=True)

    def _spline(self, z: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        knots = parameters.view(len(z), self.parameters_per_coordinate, z.shape[1]).transpose(1, 2)
        widths, heights, derivatives = knots.split((self.bins, self.bins, self.bins - 1), dim=-1)
        # softplus(θ + unit) = 1 − minimum at θ = 0: unit derivatives at the ends, and inside at the start.
        unit = math.log(math.expm1(1 - self.minimum))
        # nflows' own handling of the tails indexes by a boolean mask, several times slower than this clamp and select.
        bound = self.tail_bound
        outputs, log_det = rational_quadratic_spline(
            z.clamp(-bound, bound),
            widths,
            heights,
            pad(derivatives, (1, 1)) + unit,
            inverse=inverse,
            left=-bound,
            right=bound,
            bottom=-bound,
            top=bound,
            min_bin_width=self.minimum,
            min_bin_height=self.minimum,
            min_derivative=self.minimum,
        )
        inside = z.abs() < bound
        return torch.where(inside, outputs, z), torch.where(inside, log_det, 0).sum(1)


def spline_parameters(bins: int) -> int:
    """3K − 1: widths, heights and inner derivatives of a rational-quadratic spline of K bins with linear tails."""
    return 3 * bins - 1


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
    return packed_flow(specification, layer, spline_parameters(bins), net, dropout)


FLOWS = {"masked-spline": masked_spline}

EXAMPLES = {
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
}
