"""What the trainings minimise: each a module whose call on a batch gives a loss, as ``fit`` wants it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributions import Distribution

from adapters.flow import Flow
from adapters.priors import FlowPrior
from adapters.vae import VAE
from runs.common.images import bits_per_dim


class NegativeLogLikelihood(nn.Module):
    """−mean log p(x) in nats: what maximum likelihood minimises."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


class BitsPerDim(nn.Module):
    """The mean bits per dimension of a batch ``(x, context)``: maximum likelihood for images minimises it."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        x, context = batch
        return bits_per_dim(-self.flow.log_prob(x, context).mean(), x.shape[1])


class NegativeELBO(nn.Module):
    """−ELBO of a batch ``(x, kl_weight)``, in nats per image. A weight of ``None`` is 1.

    Attributes:
        compiled_parts: the networks and the flow, which ``--compile`` compiles. They take most of the time, and Pyro's
            own Python can't be compiled.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        from adapters.elbo import ReparameterizedELBO  # here, as importing Pyro takes long

        self.elbo = ReparameterizedELBO()(vae.model, vae.guide)
        self.compiled_parts = [vae.encoder.network, vae.decoder.network]
        if isinstance(vae.prior, FlowPrior):
            self.compiled_parts.append(vae.prior.flow.transform)

    def forward(self, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        x, kl_weight = batch
        return self.elbo(x, 1.0 if kl_weight is None else kl_weight) / len(x)


@contextmanager
def without_argument_checks() -> Iterator[None]:
    """Within, Pyro and torch.distributions check no arguments, which saves time. Afterwards they check as before.

    ``pyro.validation_enabled`` alone would set torch's switch to the state of Pyro's, which may have been another.
    """
    before = Distribution._validate_args
    import pyro  # here, as this takes long, and after it the switch would be another

    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(before)
