"""Masked rational-quadratic spline coupling: Durkan et al. (2019), "Neural Spline Flows", section 3, under any mask."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from adapters.checks import check_bins, check_positive
from adapters.layers.packed import PackedCoupling

MAX_SLOPE = 1e15  # the largest derivative at a knot: its square is still a float32


class MaskedSplineCouplingLayer(PackedCoupling):
    """z'_d = g_d(z_d) where b_d = 0, with g_d a monotone rational-quadratic spline of parameters θ_d(z_{b=1}).

    On [−B, B] the spline has K bins. Outside it is the identity. The parameters θ_d are 3K − 1 numbers: K widths and K
    heights of the bins, each through a softmax, and the K − 1 derivatives at the inner knots, through a softplus. θ = 0
    gives equal bins and derivatives of 1, which is the identity.

    Args:
        conditioner: ``(batch, U)`` → ``(batch, (3K − 1) · T)``; see ``PackedCoupling``.
        mask: b; 1 = unchanged, 0 = transformed.
        bins: K.
        tail_bound: B, in units of the layer's input.
        minimum: the smallest width and height of a bin, as a share of 2B, and the smallest derivative. It limits how
            sharp an edge and how empty a gap in the density can be.
        reads: see ``PackedCoupling``.

    Raises:
        ValueError: as ``PackedCoupling``; unless ``bins`` is an integer of at least 2 and the other numbers are
            positive; unless ``bins · minimum`` is below 1.

    >>> layer = MaskedSplineCouplingLayer(nn.Linear(1, spline_parameters(8)), torch.tensor([1, 0]), bins=8)
    >>> z = torch.tensor([[0.3, 1.5], [0.3, 9.0]])
    >>> z_prime, log_det = layer(z)
    >>> torch.allclose(layer.inverse(z_prime)[0], z, atol=1e-4), torch.equal(z_prime[1], z[1])  # 9 is beyond B
    (True, True)
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
        bins = check_bins(bins)
        if bins * minimum >= 1:
            raise ValueError(f"{bins} bins of at least {minimum} each do not fit: minimum must be below 1 / bins")
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
        """g(z) or g⁻¹(z), ``(batch, T)``, and Σ_d log of its slope, ``(batch,)``.

        The widths, heights and derivatives of the bin in which a point lies are picked out by masked sums over all
        bins. So no index, no search and no shape depends on the data, and the code compiles and exports. The formulas
        are written as sums of positive terms only, so that rounding cannot cancel digits or change a sign.
        """
        theta = parameters.view(z.shape[0], self.parameters_per_coordinate, z.shape[1])
        bins, bound, minimum = self.bins, self.tail_bound, self.minimum
        shares = theta[:, : 2 * bins].unflatten(1, (2, bins)).softmax(2)
        sizes = 2 * bound * (minimum + (1 - bins * minimum) * shares)  # widths and heights, (batch, 2, K, T)
        given, found = (1, 0) if inverse else (0, 1)
        inner = z.clamp(-bound, bound)
        passed = (inner + bound).unsqueeze(1) >= sizes[:, given, :-1].detach().cumsum(1)
        here = pad(passed, (0, 0, 1, 0), value=True) & ~pad(passed, (0, 0, 0, 1), value=False)
        corner = torch.where(passed.unsqueeze(1), sizes[:, :, :-1], 0).sum(2) - bound
        size = torch.where(here.unsqueeze(1), sizes, 0).sum(2)
        # softplus(θ + unit) = 1 − minimum at θ = 0: unit derivatives at the ends, and inside at the start.
        unit = math.log(math.expm1(1 - minimum))
        inside = theta[:, 2 * bins :]
        ends = [torch.where(here[:, k], inside, 0).sum(1) for k in (slice(1, None), slice(-1))]
        left, right = (softplus(torch.stack(ends) + unit) + minimum).clamp(max=MAX_SLOPE)
        mean = size[:, 1] / size[:, 0]
        share = ((inner - corner[:, given]) / size[:, given]).clamp(0, 1)
        x, one_minus_x = _solve(share, mean, left, right) if inverse else (share, 1 - share)
        # equations 4 and 5, with s (x² + (1 − x)²) for s (1 − 2 x (1 − x))
        square, cross, other = x * x, x * one_minus_x, one_minus_x * one_minus_x
        below = mean * (square + other) + (left + right) * cross
        log_slope = (right * square + 2 * mean * cross + left * other).log() + 2 * (mean / below).log()
        y = x if inverse else (mean * square + left * cross) / below
        outputs = corner[:, found] + size[:, found] * y
        outside = z.abs() >= bound  # a NaN is not outside, and goes through the spline as it is
        return torch.where(outside, z, outputs), torch.where(outside, 0, -log_slope if inverse else log_slope).sum(1)


def _solve(y: Tensor, mean: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """x and 1 − x of equation 4, for a share y ∈ [0, 1] of the bin's height: the root of equation 6.

    With p = left · (1 − y) − right · y, the discriminant is p² + 4 mean² y (1 − y), which is never negative. The root
    can be written in two ways; the one that takes no difference of numbers of like size is used.

    Args:
        y: the share, ``(batch, T)``.
        mean: the bin's height over its width, s in the paper.
        left, right: the derivatives at the bin's ends.
    """
    p = left * (1 - y) - right * y
    rise, rest = 2 * mean * y, 2 * mean * (1 - y)
    q = (p * p + rise * rest).sqrt() + p.abs()
    x = torch.where(p >= 0, rise, q)
    one_minus_x = torch.where(p >= 0, q, rest)
    total = x + one_minus_x
    return x / total, one_minus_x / total


def spline_parameters(bins: int) -> int:
    """3K − 1: widths, heights and inner derivatives of a rational-quadratic spline of K bins with linear tails.

    >>> spline_parameters(8)
    23
    """
    return 3 * bins - 1
