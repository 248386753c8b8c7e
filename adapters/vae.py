"""The course's variational autoencoder with Bernoulli pixels, as a Pyro model and guide whose prior is an argument.

log p(x) ≥ ELBO(x) = E_q(z|x)[log p(x|z) + log p(z) − log q(z|x)]   (nats; Kingma & Welling, 2014)

Prior, encoder and decoder are modules whose call gives a Pyro distribution: p(z), q(z | x) and p(x | z).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from nflows.flows import Flow
from torch import Tensor, nn

from adapters.bridges import as_flow
from adapters.checks import check_positive, must_wait
from adapters.imports import Later

if TYPE_CHECKING:
    import pyro
    import pyro.distributions as dist
    from pyro import poutine

    from adapters import distribution
else:
    pyro, dist, poutine = Later("pyro"), Later("pyro.distributions"), Later("pyro.poutine")
    distribution = Later("adapters.distribution")


class Encoder(nn.Module):
    """q(z | x) = N(μ(x), diag σ(x)²), or with a flow: z = μ(x) + σ(x) ⊙ u, u ~ flow(u | μ(x), log σ(x)).

    Args:
        latent: M, the width of z.
        pixels: D, the width of x.
        hidden_features: widths of the hidden layers; the last layer gives μ and log σ, 2 M numbers.
        dropout: probability of dropping a hidden unit in training.
        flow: over M features with a context of 2 M. If it starts at the identity, the posterior starts as the Gaussian.

    Raises:
        ValueError: for a flow over another width, or a width that is not positive.

    >>> q = Encoder(latent=2)(torch.rand(5, 784))
    >>> q.batch_shape, q.event_shape
    (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self,
        latent: int,
        pixels: int = 784,
        hidden_features: Sequence[int] = (512, 512),
        dropout: float = 0.0,
        flow: Flow | None = None,
    ):
        super().__init__()
        self.latent = latent
        self.network = _network((pixels, *hidden_features, 2 * latent), dropout)
        self.flow = None if flow is None else as_flow(flow)
        if self.flow is not None:
            event_shape = distribution.FlowDistribution(self.flow, torch.zeros(1, 2 * latent)).event_shape
            _check_width(event_shape, latent, "the posterior's flow")

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for images ``(batch, D)``: of batch shape ``(batch,)``, over ``(latent,)``."""
        loc, log_scale = (parameters := self.network(x)).chunk(2, -1)
        if self.flow is None:
            return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)
        # The cache keeps u of the sample z = μ + σ ⊙ u, so that log q of that sample needs no second pass of the flow.
        to_data = dist.transforms.AffineTransform(loc, log_scale.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(
            distribution.FlowDistribution(self.flow, parameters), [to_data], validate_args=False
        )


class Decoder(nn.Module):
    """p(x | z), independent Bernoulli pixels with logits from a network.

    Args:
        latent, pixels, dropout: as for ``Encoder``.
        hidden_features: widths of the hidden layers, from z to x.

    Raises:
        ValueError: for a width that is not positive.

    >>> p = Decoder(latent=2)(torch.randn(5, 2))
    >>> p.mean.shape, p.log_prob(torch.ones(5, 784)).shape  # grey images, and nats of one that is white throughout
    (torch.Size([5, 784]), torch.Size([5]))
    """

    def __init__(
        self, latent: int, pixels: int = 784, hidden_features: Sequence[int] = (512, 512), dropout: float = 0.0
    ):
        super().__init__()
        self.network = _network((latent, *hidden_features, pixels), dropout)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape ``(*batch, M)``: of batch shape ``batch``, over ``(pixels,)``."""
        # Grey pixels are scored by the same formula; Pyro would refuse them if it checked its arguments.
        return dist.Bernoulli(logits=self.network(z), validate_args=False).to_event(1)


class Model(nn.Module):
    """z ~ p(z), x ~ p(x | z): a Pyro model of the images ``(batch, D)`` in [0, 1].

    Args:
        prior: a module whose call gives p(z).
        decoder: a module whose call gives p(x | z).

    Raises:
        ValueError: in a call, for images outside [0, 1]: see ``check_images``.

    >>> from adapters.priors import StandardNormalPrior
    >>> trace = poutine.trace(Model(StandardNormalPrior(2), Decoder(2))).get_trace(torch.ones(5, 784))
    >>> trace.nodes["z"]["value"].shape, trace.nodes["x"]["is_observed"]
    (torch.Size([5, 2]), True)
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module):
        super().__init__()
        self.prior, self.decoder = prior, decoder

    def forward(self, x: Tensor, kl_weight: float | Tensor = 1.0) -> None:
        """The sites ``z`` and ``x``, the latter observed; log p(z) counts ``kl_weight`` times: see ``VAE``."""
        check_images(x)
        with pyro.plate("images", len(x)):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.decoder(z), obs=x)


class Guide(nn.Module):
    """z ~ q(z | x): a Pyro guide.

    Args:
        encoder: a module whose call gives q(z | x).

    >>> trace = poutine.trace(Guide(Encoder(latent=2))).get_trace(torch.ones(5, 784))
    >>> trace.nodes["z"]["value"].shape
    torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, kl_weight: float | Tensor = 1.0) -> None:
        """The site ``z``; log q(z | x) counts ``kl_weight`` times: see ``VAE``."""
        with pyro.plate("images", len(x)), poutine.scale(scale=kl_weight):
            pyro.sample("z", self.encoder(x))


class VAE(nn.Module):
    """``Trace_ELBO()(vae.model, vae.guide)(x)`` is −Σ ELBO(x) over the batch. Pyro's other ELBOs work in the same way.

    A second argument ``kl_weight``, β > 0, is the weight of the KL: E_q[log p(x|z)] − β E_q[log q(z|x) − log p(z)]. A
    training may begin with a small β and raise it to 1 (Bowman et al., 2016). Pyro refuses β ≤ 0.

    Args:
        prior: a module whose call gives p(z).
        encoder: a module whose call gives q(z | x). Its attribute ``latent`` is the width of z.
        decoder: a module whose call gives p(x | z).

    Raises:
        ValueError: if prior and encoder do not agree about the width of z.

    >>> from adapters import build_flow
    >>> from adapters.priors import FlowPrior
    >>> vae = VAE(FlowPrior(build_flow("masked-affine", 16)), Encoder(16), Decoder(16))
    >>> [term.shape for term in vae.terms(torch.ones(5, 784))]
    [torch.Size([5]), torch.Size([5])]
    """

    def __init__(self, prior: nn.Module, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.model, self.guide = Model(prior, decoder), Guide(encoder)
        latent: Any = encoder.latent  # a number, where type checkers expect a module or a tensor
        _check_width(prior().event_shape, latent, "the prior")

    @property
    def prior(self) -> nn.Module:
        """The module whose call gives p(z)."""
        return self.model.prior

    @property
    def encoder(self) -> nn.Module:
        """The module whose call gives q(z | x)."""
        return self.guide.encoder

    @property
    def decoder(self) -> nn.Module:
        """The module whose call gives p(x | z)."""
        return self.model.decoder

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|z) and log q(z|x) − log p(z) in nats, ``(batch,)`` each, at one z of q: the ELBO's two terms."""
        check_images(x)
        posterior = self.encoder(x)
        z = posterior.rsample()
        return self.decoder(z).log_prob(x), posterior.log_prob(z) - self.prior().log_prob(z)

    def log_weights(self, x: Tensor, samples: int) -> Tensor:
        """log p(x, z) − log q(z | x) in nats at ``samples`` draws from q: ``(samples, batch)``.

        Their mean is the ELBO, and the logarithm of the mean of their exponentials comes ever closer to log p(x) from
        below as the samples grow in number (Burda et al., 2016).
        """
        check_images(x)
        posterior = self.encoder(x)
        z = posterior.rsample((samples,))
        return self.decoder(z).log_prob(x) + self.prior().log_prob(z) - posterior.log_prob(z)


def check_images(x: Tensor) -> None:
    """Raise a ValueError unless images have the shape ``(batch, D)`` and values in [0, 1].

    The values are not looked at where the program would have to wait for them, as for a GPU.

    >>> check_images(torch.tensor([[0.0, 255.0]]))
    Traceback (most recent call last):
    ValueError: images must lie in [0, 1], but these have values from 0 to 255
    """
    if x.dim() != 2:
        raise ValueError(f"images must have the shape (batch, pixels), not {tuple(x.shape)}")
    if must_wait(x):
        return
    low, high = x.aminmax() if x.numel() else (0, 1)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], but these have values from {low:g} to {high:g}")


def _check_width(event_shape: torch.Size, latent: int, what: str) -> None:
    if event_shape != (latent,):
        raise ValueError(f"{what} is over {tuple(event_shape)}, but the encoder's z has the shape ({latent},)")


def _network(widths: Sequence[int], dropout: float) -> nn.Sequential:
    check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
    layers = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), *[nn.Dropout(dropout)] * bool(dropout)]
    while not isinstance(layers[-1], nn.Linear):
        layers.pop()
    return nn.Sequential(*layers)
