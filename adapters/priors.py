"""Priors of a latent variable: a prior is a module whose call gives a Pyro distribution over ``(latent,)``.

Any such module will do, as this one:

class Laplace(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self):
        return dist.Laplace(0.0, self.log_scale.exp()).to_event(1)

To train under it with runs/pyro_vae.py, add a line for it to that script's ``PRIORS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from nflows.flows import Flow
from torch import Tensor, nn

from adapters.bridges import as_flow
from adapters.checks import check_positive
from adapters.imports import Later
from adapters.words import in_one_line

if TYPE_CHECKING:
    import pyro.distributions as dist

    from adapters import distribution
else:
    dist, distribution = Later("pyro.distributions"), Later("adapters.distribution")


class StandardNormalPrior(nn.Module):
    """p(z) = N(0, I).

    Args:
        latent: M, the width of z.
    """

    zero: Tensor

    def __init__(self, latent: int):
        super().__init__()
        check_positive(latent=latent)
        self.register_buffer("zero", torch.zeros(latent))

    def __repr__(self) -> str:
        return in_one_line(self, f"latent {len(self.zero)}")

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)


class MixturePrior(nn.Module):
    """p(z) = Σ_k π_k N(z; μ_k, diag σ_k²): weights, means and deviations are learned.

    Args:
        latent: M, the width of z.
        components: K; their means start at draws of N(0, I), their deviations at 1.

    >>> MixturePrior(latent=2, components=10)().sample((5,)).shape
    torch.Size([5, 2])
    """

    def __init__(self, latent: int, components: int = 100):
        super().__init__()
        check_positive(latent=latent, components=components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))

    def __repr__(self) -> str:
        return in_one_line(self, f"latent {self.loc.shape[1]}", f"{len(self.loc)} components")

    def forward(self) -> dist.TorchDistribution:
        return _mixture(self.logits, dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1))


class VampPrior(nn.Module):
    """p(z) = Σ_k π_k q(z | u_k), the encoder's own posteriors at learned pseudo-inputs u_k (Tomczak & Welling, 2018).

    Args:
        encoder: q(z | x), a module whose call on ``(K, D)`` gives a distribution of batch shape ``(K,)``.
        inputs: where the K pseudo-inputs start, such as at training images: ``(K, D)`` in [0, 1], where they stay.

    Raises:
        ValueError: for inputs outside [0, 1].
    """

    def __init__(self, encoder: Callable[[Tensor], dist.TorchDistribution], inputs: Tensor):
        super().__init__()
        if not ((inputs >= 0) & (inputs <= 1)).all():
            low, high = inputs.aminmax()
            raise ValueError(f"pseudo-inputs must lie in [0, 1], but these have values from {low:g} to {high:g}")
        self.encoder = encoder
        self.logits = nn.Parameter(torch.zeros(len(inputs)))
        self.pseudo_inputs = nn.Parameter(inputs.clamp(0.05, 0.95).logit())  # at 0 and 1 there would be no gradient

    def __repr__(self) -> str:
        return in_one_line(self, f"{len(self.pseudo_inputs)} pseudo-inputs")

    def forward(self) -> dist.TorchDistribution:
        return _mixture(self.logits, self.encoder(self.pseudo_inputs.sigmoid()))


class FlowPrior(nn.Module):
    """p(z) = a flow's density, learned with the rest.

    Args:
        flow: over M features, of any library.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = as_flow(flow)

    def __repr__(self) -> str:
        return f"FlowPrior({self.flow!r})"

    def forward(self) -> distribution.FlowDistribution:
        return distribution.FlowDistribution(self.flow)


def _mixture(logits: Tensor, components: dist.TorchDistribution) -> dist.TorchDistribution:
    return dist.MixtureSameFamily(dist.Categorical(logits=logits, validate_args=False), components)
