"""Masked histogram coupling: the piecewise-linear coupling of Müller et al. (2019), section 4.1, in normal coordinates.

Each transformed coordinate is given a histogram for its density, and is made standard normal by that histogram's CDF.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.special import ndtr

from adapters.layers.coupling import PackedCoupling
from adapters.normal import ndtri

TAIL = 1e-6  # the mass of a standard normal beyond each end of the range that is transformed
FLOOR = 1e-6  # ε: the share of the histogram that is uniform


class MaskedHistogramCouplingLayer(PackedCoupling):
    """z_d = F⁻¹(H_d(F(z'_d))) where b_d = 0, data z' → noise z, with H_d the CDF of a histogram on (0, 1).

    F is the CDF of the standard normal cut off at ±B, Φ(−B) = 10⁻⁶; beyond ±B the map is the identity. The K bins of
    coordinate d have fixed edges e_dk, widths w_dk and the masses (1 − ε) softmax_k(log w_dk + θ_dk) + ε w_dk, with θ
    the conditioner's answer: θ = 0 gives H_d(u) = u, the identity. ε = 10⁻⁶ keeps any bin from being empty, where the
    density would be 0 and there would be no way back. The conditioner reads only which bin an unchanged coordinate lies
    in, scaled to [−1, 1]: for data that come in levels and were dequantised, where in the bin is noise.

    A stack that transforms each coordinate once, coarse to fine, is an autoregressive model of levels by groups (Reed
    et al. 2017), exact and fast in both directions. Within a bin the density keeps its shape.

    Args:
        conditioner: ``(batch, U)`` → ``(batch, K · T)``; see ``PackedCoupling``.
        mask: 1 = unchanged.
        edges: the inner edges, e_d1 … e_d,K−1, in the coordinate F(z'): of shape ``(*event, K − 1)``, or ``(K − 1,)``
            for all coordinates alike.
        reads: see ``PackedCoupling``.

    Raises:
        ValueError: as ``PackedCoupling``, and unless the edges increase strictly within (0, 1).
    """

    def __init__(self, conditioner: nn.Module, mask: Tensor, edges: Tensor, reads: Tensor | None = None):
        super().__init__(conditioner, mask, reads)
        edges = edges.cpu().double().expand(*self.event_shape, -1).reshape(mask.numel(), -1)
        edges = pad(pad(edges, (1, 0), value=0.0), (0, 1), value=1.0)
        widths = edges.diff(dim=1)
        if not widths.min() > 0:
            raise ValueError(f"edges must increase strictly within (0, 1), but a bin is {widths.min().item():g} wide")
        self.parameters_per_coordinate = widths.shape[1]
        like = {"dtype": torch.get_default_dtype(), "device": self.transformed.device}
        transformed, unchanged = self.transformed.cpu(), self.unchanged.cpu()
        self.register_buffer("edges", edges[transformed].to(**like))
        self.register_buffer("log_widths", widths[transformed].log().T.contiguous().to(**like))
        self.register_buffer("cuts", _uncut(edges[unchanged, 1:-1]).to(**like))
        self.bound = -NormalDist().inv_cdf(TAIL)

    def read(self, unchanged: Tensor) -> Tensor:
        bins = (unchanged.unsqueeze(1) > self.cuts.T).sum(1)
        return bins.to(unchanged.dtype) * (2 / self.cuts.shape[1]) - 1

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        masses, cumulative = self._histogram(z, parameters)
        inner = z.clamp(-self.bound, self.bound)
        u = _cut(inner)
        cuts = cumulative[:, 1:].lerp(self.edges.T[1:-1], FLOOR)
        k = (u.unsqueeze(1) >= cuts).sum(1, keepdim=True)
        left, width = self._edges_of(k)
        mass = masses.gather(1, k).squeeze(1).lerp(width, FLOOR)
        below = cumulative.gather(1, k).squeeze(1).lerp(left, FLOOR)
        outputs = left + ((u - below) / mass).clamp(0, 1) * width
        return self._finish(z, inner, outputs, (width / mass).log())

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        masses, cumulative = self._histogram(z, parameters)
        inner = z.clamp(-self.bound, self.bound)
        u = _cut(inner)
        k = (u.unsqueeze(1) >= self.edges.T[1:-1]).sum(1, keepdim=True)
        left, width = self._edges_of(k)
        mass = masses.gather(1, k).squeeze(1).lerp(width, FLOOR)
        below = cumulative.gather(1, k).squeeze(1).lerp(left, FLOOR)
        outputs = below + (u - left) / width * mass
        return self._finish(z, inner, outputs, (mass / width).log())

    def _histogram(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The bins' masses, but for the floor, and what lies below each bin: ``(batch, K, T)`` both."""
        theta = parameters.view(z.shape[0], self.parameters_per_coordinate, z.shape[1])
        masses = (theta + self.log_widths).softmax(1)
        return masses, masses.cumsum(1) - masses

    def _edges_of(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Left edge and width of bin k of each coordinate, k of shape ``(batch, 1, T)``."""
        edges = self.edges.T.expand(k.shape[0], -1, -1)
        left = edges.gather(1, k).squeeze(1)
        return left, edges.gather(1, k + 1).squeeze(1) - left

    def _finish(self, z: Tensor, inner: Tensor, u: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """F⁻¹(u) and the log-determinant of z ↦ F⁻¹(u): log|du/dF(z)| + log φ(z) − log φ(F⁻¹(u)).

        Args:
            inner: z, clamped to [−B, B], so that nothing here overflows.
        """
        outputs = _uncut(u.clamp(0, 1))
        log_det = log_slope + 0.5 * (outputs.square() - inner.square())
        outside = z.abs() >= self.bound  # not of a NaN, which goes through the histogram as it is
        return torch.where(outside, z, outputs), torch.where(outside, 0, log_det).sum(1)


def _cut(z: Tensor) -> Tensor:
    """F(z), clamped to [0, 1]."""
    return ((ndtr(z) - TAIL) / (1 - 2 * TAIL)).clamp(0, 1)


def _uncut(u: Tensor) -> Tensor:
    """F⁻¹(u)."""
    return ndtri(TAIL + (1 - 2 * TAIL) * u)
