"""Neural posterior estimation with sbi as a task: how near the learned p(θ | x) comes to the exact posterior.

A flow is trained on one set of simulations, drawn from the prior. For several observations sbi then draws from it, and
a classifier is to tell these draws from exact ones. It is right in half of the cases if the posterior is exact (C2ST).

sbi's own flows take part as ``runs.common.npe:sbi_nsf`` and ``runs.common.npe:sbi_zuko_nsf``.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Uniform

from adapters import to_library
from adapters.bridges import Bridge, check_installed, sbi
from adapters.flow import Flow
from adapters.parts import base_of, transform_of
from adapters.preprocess import Standardize
from runs.common.devices import seeded
from runs.common.task import Task, Trial

SIMULATIONS = 10_000
OBSERVATIONS = 5
DRAWS = 1000  # of either kind for each observation, at most
PIXELS = 150
SEED = 0  # of simulations and observations, which are the same for all flows


class PosteriorTask(Task):
    """C2ST between a flow's posterior and the exact one, averaged over observations; 0.5 is the best there is.

    Parameters and simulations are standardised alike for all flows.
    """

    measure, unit, loss = "C2ST", "accuracy", "−log p (nats)"
    features, context_features, layers, hidden, batch_size = 2, 2, 5, (50, 50), 256
    recipe: ClassVar = {"lr": 1e-3, "decay": 0.3, "average": 0.999}
    prior: ClassVar[Distribution]
    window: ClassVar[float]  # of the pictures, which show p(θ | x = 0) for |θ₁|, |θ₂| up to this

    def __init__(self, device: torch.device, test_points: int = DRAWS, simulations: int = SIMULATIONS):
        check_installed(cast(Bridge, sbi))
        self.device, self.draws = device, min(DRAWS, test_points)
        with seeded(SEED, torch.device("cpu")):
            theta = self.prior.sample((simulations,))
            x = self.simulate(theta)
            self.observations = self.simulate(self.prior.sample((OBSERVATIONS,)))
        self.theta, self.x = theta.to(device), x.to(device)
        self._standardize = Standardize.of(theta)
        self.mean, self.std = self.x.mean(0), self.x.std(0)

    @staticmethod
    @abstractmethod
    def simulate(theta: Tensor) -> Tensor:
        """A simulation for each row of parameters, ``(n, 2)``."""

    @staticmethod
    @abstractmethod
    def exact(x: Tensor, n: int) -> Tensor:
        """n draws from p(θ | x) of one observation ``(2,)``."""

    @staticmethod
    @abstractmethod
    def exact_at_0(theta: Tensor) -> Tensor:
        """p(θ | x = 0), ``(n, 2)`` → ``(n,)``."""

    @classmethod
    def true_picture(cls) -> np.ndarray:
        return cls.exact_at_0(cls._pictured()).view(PIXELS, PIXELS).numpy()

    @classmethod
    def _pictured(cls) -> Tensor:
        """The pictures' points, ``(PIXELS², 2)``, row by row along θ₂."""
        axis = cls.window * ((2 * torch.arange(PIXELS) + 1) / PIXELS - 1)
        return torch.cartesian_prod(axis, axis).flip(1)

    @property
    def preprocess(self) -> Transform | None:
        return self._standardize

    def context(self, x: Tensor) -> Tensor:
        return (x.to(self.mean) - self.mean) / self.std

    def vectors(self, n: int) -> Tensor:
        return self.theta[:n]

    def alone(self, flow: Flow) -> Flow:
        return Flow(Given(transform_of(flow), self.context(self.observations[0])), base_of(flow), (self.features,))

    def trial(self, flow: Flow, seed: int) -> Trial:
        generator = torch.Generator().manual_seed(seed)
        context = self.context(self.x)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(self.theta), (self.batch_size,), generator=generator).to(self.device)
            return self.theta[rows], context[rows]

        return Trial(PosteriorLoss(flow), batch, partial(self._score, flow), partial(self._picture, flow))

    def posterior(self, flow: Flow) -> Any:
        """The flow as sbi's posterior, cut to the prior's support."""
        sbi.import_sbi()
        from sbi.inference.posteriors import DirectPosterior

        builder = to_library("sbi", flow, z_score_theta="none", z_score_x="none")
        return DirectPosterior(builder(self.theta[:2], self.context(self.x[:2])).eval(), self.prior)

    def _score(self, flow: Flow) -> tuple[float, float]:
        from sbi.utils.metrics import c2st

        posterior = self.posterior(flow.cpu())
        found = []
        with seeded(SEED, torch.device("cpu")):
            for x in self.observations:
                drawn = posterior.sample((self.draws,), x=self.context(x).cpu(), show_progress_bars=False)
                found.append(c2st(drawn, self.exact(x, self.draws), seed=1).item())
        flow.to(self.device)
        return sum(found) / len(found), float(np.std(found, ddof=1)) / math.sqrt(len(found))

    @torch.no_grad()
    def _picture(self, flow: Flow) -> np.ndarray:
        theta, x = self._pictured().to(self.device), self.context(torch.zeros(1, 2)).to(self.device)
        return flow.log_prob(theta, x.expand(len(theta), -1)).exp().view(PIXELS, PIXELS).cpu().numpy()


class TwoMoons(PosteriorTask):
    """Two crescents, far apart: θ uniform on [−1, 1]², as in sbi's benchmark (Lueckmann et al. 2021, T.8).

    x = (r cos α + 0.25 − |θ₁ + θ₂| / √2, r sin α + (θ₂ − θ₁) / √2), α uniform on (−π/2, π/2), r ~ N(0.1, 0.01²).
    """

    prior: ClassVar[Distribution] = Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
    window = 0.4

    @staticmethod
    def simulate(theta: Tensor) -> Tensor:
        along, across = theta.sum(1).abs() / math.sqrt(2), (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
        return TwoMoons._crescent(len(theta)) + torch.stack((-along, across), dim=1)

    @staticmethod
    def exact(x: Tensor, n: int) -> Tensor:
        """θ ↦ x − crescent is a rotation on either half of the plane: so its inverse maps the crescent to p(θ | x)."""
        kept = torch.empty(0, 2)
        while len(kept) < n:
            along, across = (TwoMoons._crescent(4 * n) - x).unbind(1)  # p₁ − x₁ = |θ₁ + θ₂| / √2, p₂ − x₂ = −across
            signed, across = along * (2 * torch.randint(2, along.shape) - 1), -across
            theta = torch.stack((signed - across, signed + across), dim=1) / math.sqrt(2)
            kept = torch.cat((kept, theta[(along >= 0) & (theta.abs() <= 1).all(1)]))
            if len(kept) == 0:
                raise ValueError(f"no parameters within the prior give x = {x.tolist()}")
        return kept[:n]

    @staticmethod
    def exact_at_0(theta: Tensor) -> Tensor:
        """Half of the crescent's own density, at the point of it that θ would need."""
        point = torch.stack((theta.sum(1).abs(), theta[:, 0] - theta[:, 1]), dim=1) / math.sqrt(2)
        along, across = (point - torch.tensor([0.25, 0.0])).unbind(1)
        radius = torch.hypot(along, across)
        density = torch.exp(-0.5 * ((radius - 0.1) / 0.01) ** 2) / (0.01 * math.sqrt(2 * math.pi)) / (math.pi * radius)
        return torch.where(along > 0, density, 0) / 2

    @staticmethod
    def _crescent(n: int) -> Tensor:
        angle, radius = math.pi * (torch.rand(n) - 0.5), 0.1 + 0.01 * torch.randn(n)
        return torch.stack((radius * angle.cos() + 0.25, radius * angle.sin()), dim=1)


class LinearGaussian(PosteriorTask):
    """θ ~ N(0, I) and x = Aθ + N(0, 0.1 I), of which the posterior is N(Σ Aᵀx / 0.1, Σ) with Σ = (I + AᵀA / 0.1)⁻¹."""

    prior: ClassVar[Distribution] = MultivariateNormal(torch.zeros(2), torch.eye(2))
    window = 1.2
    MATRIX: ClassVar[Tensor] = torch.tensor([[1.0, 0.5], [-0.3, 0.8]])
    NOISE: ClassVar[float] = 0.1

    @staticmethod
    def simulate(theta: Tensor) -> Tensor:
        return theta @ LinearGaussian.MATRIX.T + math.sqrt(LinearGaussian.NOISE) * torch.randn_like(theta)

    @staticmethod
    def exact(x: Tensor, n: int) -> Tensor:
        return LinearGaussian._posterior(x).sample((n,))

    @staticmethod
    def exact_at_0(theta: Tensor) -> Tensor:
        return LinearGaussian._posterior(torch.zeros(2)).log_prob(theta).exp()

    @staticmethod
    def _posterior(x: Tensor) -> MultivariateNormal:
        matrix, noise = LinearGaussian.MATRIX, LinearGaussian.NOISE
        covariance = torch.linalg.inv(torch.eye(2) + matrix.T @ matrix / noise)
        return MultivariateNormal(covariance @ matrix.T @ x / noise, covariance)


class PosteriorLoss(nn.Module):
    """−mean log p(θ | x) of a batch ``(θ, x)``, in nats."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -self.flow.log_prob(*batch).mean()


class Given(Transform):
    """A conditional transform at one context, ``(C,)``, the same for each row."""

    context: Tensor

    def __init__(self, transform: Transform, context: Tensor):
        super().__init__()
        self.transform = transform
        self.register_buffer("context", context)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._apply_to(self.transform.inverse, inputs)

    def _apply_to(self, function: Callable, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return function(inputs, self.context.expand(len(inputs), -1))


def sbi_nsf(features: int, context_features: int, layers: int, hidden_features: tuple[int, ...]) -> nn.Module:
    """sbi's ``nsf``, which is made of nflows."""
    return _own("nsf", features, context_features, layers, hidden_features[0])


def sbi_zuko_nsf(features: int, context_features: int, layers: int, hidden_features: tuple[int, ...]) -> nn.Module:
    """sbi's ``zuko_nsf``."""
    return _own("zuko_nsf", features, context_features, layers, hidden_features[0])


def _own(name: str, features: int, context_features: int, layers: int, width: int) -> nn.Module:
    """sbi's own estimator without its standardisation, which the task does for all; it need not see data then."""
    sbi.import_sbi()
    from sbi.neural_nets import posterior_nn

    z_scores: dict[str, Any] = {"z_score_theta": "none", "z_score_x": "none"}
    build = posterior_nn(name, hidden_features=width, num_transforms=layers, **z_scores)
    return build(torch.zeros(2, features), torch.zeros(2, context_features))
