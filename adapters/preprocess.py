"""Fixed transforms at the data side of a flow: data → something of unit scale, with their log-determinants.

They have no parameters, but buffers: a checkpoint carries them, and bits/dim stay in the space of the data.
"""

import math

import torch
from nflows.transforms import PointwiseAffineTransform, Transform
from torch import Tensor
from torch.nn.functional import softplus

from adapters.checks import check_positive


class Standardize(PointwiseAffineTransform):
    """y = (x − mean) / std per coordinate.

    Args:
        mean, std: of the shape of one datum.

    Raises:
        ValueError: unless every std is positive and finite.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        mean, std = torch.as_tensor(mean), torch.as_tensor(std)
        if not torch.all((std > 0) & std.isfinite()):
            raise ValueError(f"std must be positive and finite, but holds {std.min().item()}")
        super().__init__(shift=-mean / std, scale=1 / std)
        self.arguments = {"mean": mean, "std": std}

    @classmethod
    def of(cls, data: Tensor) -> "Standardize":
        """With the mean and standard deviation of ``(batch, *event)`` data."""
        return cls(data.mean(0), data.std(0))


class UnitInterval(Transform):
    """y = g(α + (1 − 2α) x / high) for data in [0, high], with g: (0, 1) → ℝ and α to keep the ends finite.

    Args:
        alpha: α in (0, 1/2).
        high: upper end of the data's range.

    Raises:
        ValueError: for α or ``high`` out of range; in a call, for data outside [0, high].
    """

    def __init__(self, alpha: float = 1e-6, high: float = 1.0):
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 1/2), not {alpha}")
        check_positive(high=high)
        super().__init__()
        self.arguments = {"alpha": alpha, "high": high}
        self.slope = (1 - 2 * alpha) / high

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = inputs.aminmax()
        if low < 0 or high > self.arguments["high"]:
            raise ValueError(
                f"this flow takes data in [0, {self.arguments['high']}], not in [{low.item():g}, {high.item():g}]"
            )
        outputs = self.stretch(self.arguments["alpha"] + self.slope * inputs)
        return outputs, self._log_det(outputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = (self.squash(inputs) - self.arguments["alpha"]) / self.slope
        return outputs, -self._log_det(inputs)

    def _log_det(self, y: Tensor) -> Tensor:
        """Σ log|dy/dx| = Σ (log(slope) − log dg⁻¹(y)/dy)."""
        return (math.log(self.slope) - self.log_squash_slope(y)).flatten(1).sum(1)


class Logit(UnitInterval):
    """g = logit: Papamakarios et al. (2017), on image data. See ``UnitInterval``."""

    @staticmethod
    def stretch(p: Tensor) -> Tensor:
        return p.log() - (-p).log1p()

    squash = staticmethod(torch.sigmoid)

    @staticmethod
    def log_squash_slope(y: Tensor) -> Tensor:
        """log σ'(y) = −|y| − 2 softplus(−|y|)."""
        size = y.abs()
        return -size - 2 * softplus(-size)


class Probit(UnitInterval):
    """g = Φ⁻¹, the standard normal's quantile function: it makes uniform data standard normal. See ``UnitInterval``."""

    stretch = staticmethod(torch.special.ndtri)
    squash = staticmethod(torch.special.ndtr)

    @staticmethod
    def log_squash_slope(y: Tensor) -> Tensor:
        """log φ(y) = −y²/2 − log(2π)/2."""
        return -0.5 * y.square() - 0.5 * math.log(2 * math.pi)


PREPROCESSORS = {"standardize": Standardize, "logit": Logit, "probit": Probit}
