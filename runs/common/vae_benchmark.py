"""What Pyro costs: a training step by its ``Trace_ELBO`` beside one of the same ELBO in plain PyTorch."""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters.priors import FlowPrior
from adapters.vae import VAE, Decoder, Encoder
from runs.common.devices import device_of
from runs.common.images import SHAPE
from runs.common.objectives import NegativeELBO, without_argument_checks
from runs.common.timing import interleaved, ratio, training_step

ROUNDS = 200


def pyro_loss(vae: VAE, x: Tensor) -> Callable[[], Tensor]:
    """−ELBO of images ``(n, D)``, in nats per image, as the run trains it."""
    loss, weight = NegativeELBO(vae), torch.ones((), device=x.device)
    return lambda: loss((x, weight))


def plain_loss(vae: VAE, x: Tensor) -> Callable[[], Tensor]:
    """The same without Pyro, for a flow prior and a Gaussian posterior."""
    prior, encoder, decoder = vae.prior, vae.encoder, vae.decoder
    assert isinstance(prior, FlowPrior) and isinstance(encoder, Encoder) and isinstance(decoder, Decoder)

    def loss() -> Tensor:
        loc, log_scale = encoder.network(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        log_q = -(0.5 * noise.square() + log_scale + 0.5 * math.log(2 * math.pi)).sum(1)
        log_p = -binary_cross_entropy_with_logits(decoder.network(z), x, reduction="none").sum(1)
        return -(log_p + prior.flow.log_prob(z) - log_q).mean()

    return loss


def benchmark(vae: VAE, batch_size: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Print and give the median time of a training step both ways, in turn, and the median of their ratios."""
    device = device_of(vae)
    x = (torch.rand(batch_size, math.prod(SHAPE)) > 0.8).float().to(device)
    losses = {"pyro": pyro_loss(vae, x), "plain": plain_loss(vae, x)}
    steps = {name: training_step(vae.parameters(), loss) for name, loss in losses.items()}
    with without_argument_checks():
        times = interleaved(steps, rounds, device, warmup=min(20, rounds))
    found = {"step_ratio": ratio(times["pyro"], times["plain"])}
    found |= {f"{name}_ms": statistics.median(milliseconds) for name, milliseconds in times.items()}
    print(
        f"a training step of {batch_size} images: {found['pyro_ms']:.2f} ms by Trace_ELBO, {found['plain_ms']:.2f} ms "
        f"in plain PyTorch, {found['step_ratio']:.3f} times as long (median of {rounds} pairs)"
    )
    return found
