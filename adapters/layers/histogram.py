"""Masked histogram coupling: the piecewise-linear coupling of Müller et al. (2019), section 4.1, in normal coordinates.

Each transformed coordinate is given a histogram for its density, and is made standard normal by that histogram's CDF.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.special import ndtr

from adapters.layers.packed import PackedCoupling
from adapters.normal import ndtri

TAIL_MASS = 1e-6  # Φ(−B): the mass of a standard normal beyond each end of the range that is transformed
UNIFORM_SHARE = 1e-6  # ε: the share of each histogram that is uniform


class MaskedHistogramCouplingLayer(PackedCoupling):
    """z_d = F⁻¹(H_d(F(z'_d))) where b_d = 0, data z' → noise z, with H_d the CDF of a histogram on (0, 1).

    F is the CDF of the standard normal cut off at ±B, with Φ(−B) = 10⁻⁶. Beyond ±B the map is the identity.

    The histogram of coordinate d has K bins. Their edges e_dk and widths w_dk are fixed. Their masses are

        (1 − ε) softmax_k(log w_dk + θ_dk) + ε w_dk,

    with θ the conditioner's output. For θ = 0 this is H_d(u) = u, the identity. ε = 10⁻⁶ keeps every bin from being
    empty: an empty bin would have the density 0, and the map would have no inverse there.

    The conditioner is given only the bin in which a coordinate lies, as a number in [−1, 1]. This is for data that come
    in discrete levels and were dequantised: where a value lies within its bin is then noise.

    A stack of these layers that transforms each coordinate once, coarse to fine, is an autoregressive model of the
    levels by groups of pixels (Reed et al. 2017), exact and fast in both directions. Within a bin the density keeps its
    shape.

    Args:
        conditioner: ``(batch, U)`` → ``(batch, K · T)``; see ``PackedCoupling``.
        mask: b; 1 = unchanged, 0 = transformed.
        edges: the inner edges e_d1 … e_d,K−1 on the scale of F(z'), of shape ``(*event, K − 1)``; or of shape
            ``(K − 1,)``, the same for all coordinates.
        reads: see ``PackedCoupling``.

    Raises:
        ValueError: as ``PackedCoupling``, and unless the edges increase strictly within (0, 1).

    >>> def conditioner(bins):  # of two bins, the lower one has three quarters of the mass
    ...     return torch.tensor([[3.0, 1.0]]).log().expand(len(bins), 2)
    >>> layer = MaskedHistogramCouplingLayer(conditioner, torch.tensor([1, 0]), edges=torch.tensor([0.5]))
    >>> layer.inverse(torch.zeros(1, 2))[0]  # the edge between them goes where three quarters of a normal lie below
    tensor([[0.0000, 0.6745]])
    """

    edges: Tensor  # of the transformed coordinates, 0 and 1 included: (T, K + 1)
    log_widths: Tensor  # of the transformed coordinates: (K, T)
    cuts: Tensor  # the inner edges of the coordinates that the conditioner reads, on the scale of z: (U, K − 1)

    def __init__(self, conditioner: nn.Module, mask: Tensor, edges: Tensor, reads: Tensor | None = None):
        super().__init__(conditioner, mask, reads)
        edges = edges.cpu().double().expand(*self.event_shape, -1).reshape(mask.numel(), -1)
        edges = pad(pad(edges, (1, 0), value=0.0), (0, 1), value=1.0)
        widths = edges.diff(dim=1)
        if not widths.min() > 0:
            raise ValueError(f"edges must increase strictly within (0, 1), but a bin is {widths.min().item():g} wide")
        self.parameters_per_coordinate = widths.shape[1]
        like = {"dtype": torch.get_default_dtype(), "device": self.transformed.device}
        transformed, conditioning = self.transformed.cpu(), self.conditioning.cpu()
        self.register_buffer("edges", edges[transformed].to(**like))
        self.register_buffer("log_widths", widths[transformed].log().T.contiguous().to(**like))
        self.register_buffer("cuts", _uncut(edges[conditioning, 1:-1]).to(**like))
        self.bound = -NormalDist().inv_cdf(TAIL_MASS)

    def conditioner_input(self, z: Tensor) -> Tensor:
        """The bin in which each coordinate lies, 0 … K − 1, scaled to [−1, 1]."""
        bins = (z.unsqueeze(1) > self.cuts.T).sum(1)
        return bins.to(z.dtype) * (2 / self.cuts.shape[1]) - 1

    def elementwise(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        masses, cumulative = self._histogram(z, parameters)
        inner = z.clamp(-self.bound, self.bound)
        u = _cut(inner)
        cuts = cumulative[:, 1:].lerp(self.edges.T[1:-1], UNIFORM_SHARE)
        k = (u.unsqueeze(1) >= cuts).sum(1, keepdim=True)
        left, width = self._edges_of(k)
        mass = masses.gather(1, k).squeeze(1).lerp(width, UNIFORM_SHARE)
        below = cumulative.gather(1, k).squeeze(1).lerp(left, UNIFORM_SHARE)
        outputs = left + ((u - below) / mass).clamp(0, 1) * width
        return self._finish(z, inner, outputs, (width / mass).log())

    def elementwise_inverse(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        masses, cumulative = self._histogram(z, parameters)
        inner = z.clamp(-self.bound, self.bound)
        u = _cut(inner)
        k = (u.unsqueeze(1) >= self.edges.T[1:-1]).sum(1, keepdim=True)
        left, width = self._edges_of(k)
        mass = masses.gather(1, k).squeeze(1).lerp(width, UNIFORM_SHARE)
        below = cumulative.gather(1, k).squeeze(1).lerp(left, UNIFORM_SHARE)
        outputs = below + (u - left) / width * mass
        return self._finish(z, inner, outputs, (mass / width).log())

    def _histogram(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Each bin's mass and the mass below it, both without the uniform share: ``(batch, K, T)``."""
        theta = parameters.view(z.shape[0], self.parameters_per_coordinate, z.shape[1])
        masses = (theta + self.log_widths).softmax(1)
        return masses, masses.cumsum(1) - masses

    def _edges_of(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Left edge and width of bin k of each coordinate, k of shape ``(batch, 1, T)``."""
        edges = self.edges.T.expand(k.shape[0], -1, -1)
        left = edges.gather(1, k).squeeze(1)
        return left, edges.gather(1, k + 1).squeeze(1) - left

    def _finish(self, z: Tensor, inner: Tensor, u: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """F⁻¹(u) and the log-determinant of z ↦ F⁻¹(u), which is log|du/dF(z)| + log φ(z) − log φ(F⁻¹(u)).

        Args:
            inner: z, clamped to [−B, B], so that nothing here overflows.
            log_slope: log|du/dF(z)|, ``(batch, T)``.
        """
        outputs = _uncut(u.clamp(0, 1))
        log_det = log_slope + 0.5 * (outputs.square() - inner.square())
        outside = z.abs() >= self.bound  # a NaN is not outside, and goes through the histogram as it is
        return torch.where(outside, z, outputs), torch.where(outside, 0, log_det).sum(1)


def _cut(z: Tensor) -> Tensor:
    """F(z), clamped to [0, 1]."""
    return ((ndtr(z) - TAIL_MASS) / (1 - 2 * TAIL_MASS)).clamp(0, 1)


def _uncut(u: Tensor) -> Tensor:
    """F⁻¹(u)."""
    return ndtri(TAIL_MASS + (1 - 2 * TAIL_MASS) * u)
