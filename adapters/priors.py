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
    """p(z) = N(0, I), the prior of Kingma & Welling (2014). It has no parameters.

    Args:
        latent: M, the width of z.

    Raises:
        ValueError: unless ``latent`` is positive.

    >>> StandardNormalPrior(latent=2)().log_prob(torch.zeros(2))  # −log 2π
    tensor(-1.8379)
    """

    zero: Tensor

    def __init__(self, latent: int):
        super().__init__()
        check_positive(latent=latent)
        self.register_buffer("zero", torch.zeros(latent))

    def __repr__(self) -> str:
        return in_one_line(self, f"latent {len(self.zero)}")

    def forward(self) -> dist.TorchDistribution:
        """p(z), over ``(latent,)``."""
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)


class MixturePrior(nn.Module):
    """p(z) = Σ_k π_k N(z; μ_k, diag σ_k²): weights, means and deviations are learned.

    Args:
        latent: M, the width of z.
        components: K. Their weights start equal, their means at draws of N(0, I), and their deviations at 1.

    Raises:
        ValueError: unless both are positive.

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
        """p(z), over ``(latent,)``, with the weights, means and deviations of now."""
        return _mixture(self.logits, dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1))


class VampPrior(nn.Module):
    """p(z) = Σ_k π_k q(z | u_k), the encoder's own posteriors at learned pseudo-inputs u_k (Tomczak & Welling, 2018).

    Args:
        encoder: q(z | x), a module whose call on ``(K, D)`` gives a distribution of batch shape ``(K,)``.
        inputs: where the K pseudo-inputs start, such as at training images: ``(K, D)`` in [0, 1], where they stay.

    Raises:
        ValueError: for inputs outside [0, 1].

    >>> from adapters.vae import Encoder
    >>> encoder, u, z = Encoder(latent=2, pixels=4), torch.full((1, 4), 0.5), torch.zeros(1, 2)
    >>> prior = VampPrior(encoder, u)  # with one pseudo-input it is the posterior there
    >>> torch.allclose(prior().log_prob(z), encoder(u).log_prob(z))
    True
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
        """p(z), over ``(latent,)``, with the encoder and the pseudo-inputs of now."""
        return _mixture(self.logits, self.encoder(self.pseudo_inputs.sigmoid()))


class FlowPrior(nn.Module):
    """p(z) = p_base(f(z)) |det J_f(z)|, a flow's density, which is learned with the rest.

    Args:
        flow: over M features, of any library.

    Raises:
        TypeError: for an object of no known library.

    >>> from adapters import build_flow
    >>> flow, z = build_flow("masked-affine", features=2), torch.randn(5, 2)
    >>> torch.equal(FlowPrior(flow)().log_prob(z), flow.log_prob(z))
    True
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = as_flow(flow)

    def __repr__(self) -> str:
        return f"FlowPrior({self.flow!r})"

    def forward(self) -> distribution.FlowDistribution:
        """p(z), over ``(latent,)``: the flow itself, not a copy."""
        return distribution.FlowDistribution(self.flow)


def _mixture(logits: Tensor, components: dist.TorchDistribution) -> dist.TorchDistribution:
    return dist.MixtureSameFamily(dist.Categorical(logits=logits, validate_args=False), components)
