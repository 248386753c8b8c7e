"""The two toy densities of the exercise (its figure 1), with samples, log-density and exact entropy."""

import math
from abc import ABC, abstractmethod

import torch
from nflows.transforms import Transform
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from adapters.preprocess import Probit, Standardize


class Density(ABC):
    """A density in the plane.

    Args:
        device: where ``sample`` makes its points.

    Attributes:
        entropy: −E[log p], in nats.
    """

    entropy: float

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @abstractmethod
    def preprocess(self) -> Transform:
        """The fixed first transform that suits the support."""

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """``(n, 2)`` fresh points, on the device."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats: ``(n, 2)`` → ``(n,)``, in float64 and so on the CPU, since not every device has float64."""


class TwoGaussians(Density):
    """An uneven mixture: weights 1/5 and 4/5, means (0.75, 0.75) and (0.25, 0.25), standard deviation 0.1 on each axis.

    Attributes:
        entropy: −E[log p] = −1.26736 nats, by quadrature of p log p on a grid: tests/test_toy.py repeats it.
    """

    entropy = -1.267358060887037

    def preprocess(self) -> Transform:
        """The fixed first transform that suits the support: the plane, so zero mean and unit deviation, exactly."""
        mean = 0.2 * 0.75 + 0.8 * 0.25
        variance = 0.1**2 + 0.2 * 0.8 * (0.75 - 0.25) ** 2
        return Standardize(torch.full((2,), mean), torch.full((2,), math.sqrt(variance)))

    def sample(self, n: int) -> Tensor:
        mean = torch.where(torch.rand(n, 1, device=self.device) < 0.2, 0.75, 0.25)
        return mean + 0.1 * torch.randn(n, 2, device=self.device)

    def log_prob(self, x: Tensor) -> Tensor:
        means = torch.tensor([[0.75, 0.75], [0.25, 0.25]], dtype=torch.float64)
        weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
        mixture = MixtureSameFamily(Categorical(weights), Independent(Normal(means, 0.1), 1))
        return mixture.log_prob(x.cpu().double())


class Chequerboard(Density):
    """Uniform on the five squares of a 3 × 3 grid on [0, 1]² whose indices sum to an even number.

    Attributes:
        entropy: log(5/9) nats, exactly.
    """

    entropy = math.log(5 / 9)

    def preprocess(self) -> Transform:
        """The fixed first transform that suits the support: Φ⁻¹, from the unit square to the plane."""
        return Probit()

    def sample(self, n: int) -> Tensor:
        square = 2 * torch.randint(5, (n,), device=self.device)  # squares 0, 2, 4, 6, 8 of nine
        corner = torch.stack((square // 3, square % 3), dim=1)
        return (corner + torch.rand(n, 2, device=self.device)) / 3

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.cpu().double()
        inside = ((x >= 0) & (x <= 1)).all(1) & ((3 * x).floor().sum(1) % 2 == 0)
        return torch.zeros_like(x[:, 0]).sub(self.entropy).masked_fill(~inside, -math.inf)


DENSITIES = {"two-gaussians": TwoGaussians, "chequerboard": Chequerboard}
