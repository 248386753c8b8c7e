"""Fixed transforms at the data side of a flow, which bring the data to a scale that a flow can learn from.

They are part of the flow, and their log-determinants are counted, so that densities and bits/dim are those of the data
themselves. They have buffers but no parameters. ``arguments``, the arguments that one was made with, go into a
checkpoint, so that it can be made again.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from nflows.transforms import PointwiseAffineTransform, Transform
from torch import Tensor
from torch.nn.functional import softplus

from adapters.checks import check_positive, must_wait
from adapters.normal import ndtri
from adapters.words import shape_in_words


class Standardize(PointwiseAffineTransform):
    """y = (x − mean) / std, for each coordinate.

    Args:
        mean, std: tensors of the shape of one datum.

    Raises:
        ValueError: unless every mean is finite and every std positive and finite.

    >>> y, log_det = Standardize(torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[5.0]]))
    >>> y
    tensor([[2.]])
    """

    arguments: dict[str, Any]

    def __init__(self, mean: Tensor, std: Tensor):
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        wrong = {
            "mean must be finite": mean[~mean.isfinite()],
            "std must be positive and finite": std[~((std > 0) & std.isfinite())],
        }
        for rule, values in wrong.items():
            if len(values):
                raise ValueError(f"{rule}, but holds {values[0].item()}")
        super().__init__(shift=-mean / std, scale=1 / std)
        self.arguments = {"mean": mean, "std": std}

    def __repr__(self) -> str:
        return f"Standardize({shape_in_words(self.arguments['mean'].shape) or 'one mean and deviation'})"

    @classmethod
    def of(cls, data: Tensor) -> "Standardize":
        """Make one with the mean and standard deviation of these data, ``(batch, *event)``.

        >>> Standardize.of(torch.tensor([[1.0], [2.0], [3.0]]))(torch.tensor([[4.0]]))[0]
        tensor([[2.]])
        """
        return cls(data.mean(0), data.std(0))


class UnitInterval(Transform, ABC):
    """y = g(α + (1 − 2α) x / high) for data in [0, high], with g: (0, 1) → ℝ.

    α keeps y finite at both ends of the interval. The inverse maps ℝ to an interval that is larger by α high / (1 − 2α)
    at each end, so that samples may lie outside [0, high] by so much; data may, too. Where g's argument rounds to 0 or
    1, the nearest number between them is taken.

    A subclass gives g as ``stretch``, g⁻¹ as ``squash``, and log dg⁻¹(y)/dy as ``log_squash_slope``, each elementwise.

    Args:
        alpha: α in (0, 1/2).
        high: upper end of the data's range.

    Raises:
        ValueError: for α or ``high`` out of range; in a call, for data outside that larger interval. On a GPU such data
            have the log-density −inf instead, because a check of values would slow down every call.

    >>> logit = Logit(alpha=0.25)  # α high / (1 − 2α) is 1/2
    >>> logit.inverse(torch.tensor([[-math.inf, math.inf]]))[0]
    tensor([[-0.5000,  1.5000]])
    """

    arguments: dict[str, Any]

    def __init__(self, alpha: float = 1e-6, high: float = 1.0):
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 1/2), not {alpha}")
        check_positive(high=high)
        super().__init__()
        self.arguments = {"alpha": alpha, "high": high}
        self.slope = (1 - 2 * alpha) / high

    def __repr__(self) -> str:
        return f"{type(self).__name__}([0, {self.arguments['high']:g}], alpha {self.arguments['alpha']:g})"

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ↦ y and Σ_d log|dy_d/dx_d|. Shapes ``(batch, *event)`` and ``(batch,)``; the context is not used."""
        alpha, high = self.arguments["alpha"], self.arguments["high"]
        outside = _outside(inputs, high, alpha / self.slope, f"[0, {high}]")
        limits = torch.finfo(inputs.dtype)
        outputs = self.stretch((alpha + self.slope * inputs).clamp(limits.tiny, 1 - limits.eps / 2))
        return outputs, self._log_det(outputs).masked_fill(outside, -math.inf)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """y ↦ x and Σ_d log|dx_d/dy_d|, of the same shapes."""
        outputs = (self.squash(inputs) - self.arguments["alpha"]) / self.slope
        return outputs, -self._log_det(inputs)

    def _log_det(self, y: Tensor) -> Tensor:
        """Σ log|dy/dx| = Σ (log(slope) − log dg⁻¹(y)/dy)."""
        return (math.log(self.slope) - self.log_squash_slope(y)).flatten(1).sum(1)

    @staticmethod
    @abstractmethod
    def stretch(p: Tensor) -> Tensor:
        """g(p)."""

    @staticmethod
    @abstractmethod
    def squash(y: Tensor) -> Tensor:
        """g⁻¹(y)."""

    @staticmethod
    @abstractmethod
    def log_squash_slope(y: Tensor) -> Tensor:
        """log dg⁻¹(y)/dy."""


class Logit(UnitInterval):
    """``UnitInterval`` with g the logit, g(p) = log(p / (1 − p)), as Papamakarios et al. (2017) treat images.

    >>> Logit(alpha=0.05, high=255)(torch.tensor([[0.0, 127.5, 255.0]]))[0]
    tensor([[-2.9444,  0.0000,  2.9444]])
    """

    @staticmethod
    def stretch(p: Tensor) -> Tensor:
        return p.log() - (-p).log1p()

    @staticmethod
    def squash(y: Tensor) -> Tensor:
        return torch.sigmoid(y)

    @staticmethod
    def log_squash_slope(y: Tensor) -> Tensor:
        """log σ'(y) = −|y| − 2 softplus(−|y|)."""
        size = y.abs()
        return -size - 2 * softplus(-size)


class Probit(UnitInterval):
    """``UnitInterval`` with g = Φ⁻¹, the standard normal's quantile function: uniform data become standard normal.

    >>> Probit()(torch.tensor([[0.25, 0.5, 0.75]]))[0]
    tensor([[-0.6745,  0.0000,  0.6745]])
    """

    @staticmethod
    def stretch(p: Tensor) -> Tensor:
        return ndtri(p)

    @staticmethod
    def squash(y: Tensor) -> Tensor:
        return torch.special.ndtr(y)

    @staticmethod
    def log_squash_slope(y: Tensor) -> Tensor:
        """log φ(y) = −y²/2 − log(2π)/2."""
        return -0.5 * y.square() - 0.5 * math.log(2 * math.pi)


class Marginals(Transform):
    """z_d = Φ⁻¹(α + (1 − 2α) F_d(x_d)), with F_d the CDF of coordinate d, as a histogram of the data has it.

    It makes each coordinate standard normal on its own. What is left for a flow to learn is how the coordinates depend
    on each other: their copula. It is for data that come in L levels and were dequantised,
    x = (level + U(0, 1)) · high / L.

    Args:
        masses: the histograms, ``(D, L)``, all positive. Each row is normalised to a sum of 1.
        high: upper end of the data's range.
        alpha: α in (0, 1/2).

    Raises:
        ValueError: for masses that are not positive or not of two dimensions; in a call, for data outside [0, high], as
            in ``UnitInterval``.

    >>> marginals = Marginals(torch.tensor([[3.0, 1.0]]))  # three quarters of the data lie below 1/2,
    >>> marginals(torch.tensor([[0.5]]))[0]  # as three quarters of a standard normal lie below 0.6745
    tensor([[0.6745]])
    """

    arguments: dict[str, Any]
    masses: Tensor  # (D, L), each row adding up to 1
    below: Tensor  # (D, L), the mass of all lower levels

    def __init__(self, masses: Tensor, high: float = 1.0, alpha: float = 1e-6):
        super().__init__()
        masses = torch.as_tensor(masses)
        if masses.dim() != 2 or not masses.min() > 0:
            raise ValueError(f"masses must be positive and of shape (D, L), not {tuple(masses.shape)}, {masses.min()}")
        check_positive(high=high)
        self.arguments = {"masses": masses, "high": high, "alpha": alpha}
        self.probit = Probit(alpha)
        self.width = high / masses.shape[1]
        exact = masses.double() / masses.double().sum(1, keepdim=True)
        self.register_buffer("masses", exact.to(torch.get_default_dtype()))
        self.register_buffer("below", (exact.cumsum(1) - exact).to(torch.get_default_dtype()))

    def __repr__(self) -> str:
        return f"Marginals({len(self.masses)} features, {self.masses.shape[1]} levels)"

    @classmethod
    def of(cls, levels: Tensor, number: int = 256, high: float = 256 / 255, prior: float = 100.0) -> "Marginals":
        """Make one from data.

        Args:
            levels: the data before their dequantisation, ``(batch, D)``: integers 0 … L − 1.
            number: L.
            high: upper end of the range of the dequantised data.
            prior: strength of the smoothing, as a number of observations. So many, distributed as the levels of all
                coordinates together, are added to the counts of each coordinate.

        >>> Marginals.of(torch.tensor([[0], [0], [0], [1]]), number=2, prior=0.0).masses
        tensor([[0.7500, 0.2500]])
        """
        levels = levels.flatten(1)
        counts = torch.stack([torch.bincount(column, minlength=number) for column in levels.T]).double()
        shared = counts.sum(0) + 1
        masses = (counts + prior * shared / shared.sum()) / (len(levels) + prior)
        return cls(masses.float(), high)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x ↦ z and Σ_d log|dz_d/dx_d|. Shapes ``(batch, D)`` and ``(batch,)``; the context is not used."""
        high = self.arguments["high"]
        outside = _outside(inputs, high, 0, f"[0, {high:g}]")
        position = inputs / self.width
        level = position.long().clamp(0, self.masses.shape[1] - 1)
        mass = self.masses.gather(1, level.T).T
        u = self.below.gather(1, level.T).T + (position - level) * mass
        outputs, log_det = self.probit(u.clamp(0, 1))
        log_det = log_det + (mass / self.width).log().sum(1)
        return outputs, log_det.masked_fill(outside, -math.inf)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """z ↦ x and Σ_d log|dx_d/dz_d|, of the same shapes."""
        u, log_det = self.probit.inverse(inputs)
        level = (torch.searchsorted(self.below, u.T.contiguous(), right=True) - 1).clamp(min=0)
        mass = self.masses.gather(1, level).T
        inside = ((u - self.below.gather(1, level).T) / mass).clamp(0, 1)
        return (level.T + inside) * self.width, log_det - (mass / self.width).log().sum(1)

    def edges(self, bins: int) -> Tensor:
        """Divide the levels into groups, and give F_d at the boundaries between them, ``(D, bins − 1)``.

        Over all coordinates together the groups have about equal mass. A level with more than that is a group of its
        own. ``MaskedHistogramCouplingLayer`` takes the boundaries as the edges of its bins.

        >>> Marginals(torch.ones(1, 4)).edges(bins=2)
        tensor([[0.5000]], dtype=torch.float64)
        """
        masses = self.arguments["masses"].double()
        masses = masses / masses.sum(1, keepdim=True)
        ends, left, group = [], 1.0, 0.0
        for level, mass in enumerate((masses.sum(0) / len(masses)).tolist()[:-1]):
            group += mass
            if len(ends) < bins - 1 and group >= left / (bins - len(ends)) - mass / 2:
                ends.append(level)
                left, group = left - group, 0.0
        return masses.cumsum(1)[:, ends]


def _outside(inputs: Tensor, high: float, margin: float, interval: str) -> Tensor:
    """Which rows lie outside [−margin, high + margin] by more than rounding errors: ``(batch,)``. NaN does not count.

    Raises:
        ValueError: if any row does, where a check of values is free. On a GPU the program would have to wait for it
            (see ``must_wait``), and in a trace or in ``torch.func.vmap`` there are no values. There the caller gives
            such rows the density 0.
    """
    margin = margin + 4 * high * torch.finfo(inputs.dtype).eps
    outside = ((inputs < -margin) | (inputs > high + margin)).flatten(1).any(1)
    if must_wait(outside) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return outside
    try:
        refused = bool(outside.any())
    except RuntimeError:  # within torch.func.vmap
        return outside
    if refused:
        low, top = inputs[~inputs.isnan()].aminmax()
        raise ValueError(f"this flow takes data in {interval}, not in [{low.item():.7g}, {top.item():.7g}]")
    return outside


PREPROCESSORS = {"standardize": Standardize, "logit": Logit, "probit": Probit, "marginals": Marginals}
