"""Fixed transforms at the data side of a flow: data → something of unit scale, with their log-determinants.

They have no parameters, but buffers: a checkpoint carries them, and bits/dim stay in the space of the data.
"""

import math

import torch
from nflows.transforms import PointwiseAffineTransform, Transform
from torch import Tensor
from torch.nn.functional import softplus


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


class Logit(Transform):
    """y = logit(α + (1 − 2α) x / high), for data in [0, high]: Papamakarios et al. (2017), appendix on images.

    Args:
        alpha: α in (0, 1/2), which keeps the ends finite.
        high: upper end of the data's range.

    Raises:
        ValueError: for α or ``high`` out of range; in a call, for data outside [0, high].
    """

    def __init__(self, alpha: float = 1e-6, high: float = 1.0):
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 1/2), not {alpha}")
        if not high > 0:
            raise ValueError(f"high must be positive, not {high}")
        super().__init__()
        self.arguments = {"alpha": alpha, "high": high}
        self.slope = (1 - 2 * alpha) / high

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        low, high = inputs.aminmax()
        if low < 0 or high > self.arguments["high"]:
            raise ValueError(
                f"the logit takes data in [0, {self.arguments['high']}], not in [{low.item():g}, {high.item():g}]"
            )
        p = self.arguments["alpha"] + self.slope * inputs
        outputs = p.log() - (-p).log1p()
        return outputs, self._log_det(outputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = (inputs.sigmoid() - self.arguments["alpha"]) / self.slope
        return outputs, -self._log_det(inputs)

    def _log_det(self, y: Tensor) -> Tensor:
        """Σ log|dy/dx| = Σ log(slope) − log σ'(y), with −log σ'(y) = softplus(y) + softplus(−y) = |y| + 2 softplus(−|y|)."""
        size = y.abs()
        return (size + 2 * softplus(-size)).flatten(1).sum(1) + math.log(self.slope) * y[0].numel()


PREPROCESSORS = {"standardize": Standardize, "logit": Logit}
