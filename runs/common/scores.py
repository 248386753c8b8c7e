"""What the test data say of a trained model, with noise that is fixed in advance: the same model, the same score."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters.flow import Flow
from adapters.vae import VAE
from runs.common.densities import Density
from runs.common.devices import device_of, seeded
from runs.common.images import dequantize

TEST_POINTS = 100_000  # fresh points of a density in the plane
EVALUATION_SEED = 0  # of the noise on validation and test images: always the same
CHUNK = 500  # images scored at once
ROWS = 5_000  # draws of z scored at once, for the importance weights
MATCHED = 10_000  # draws of prior and posterior that the classifier tells apart


# Densities in the plane


@torch.no_grad()
def divergence(true: Density, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """KL(true ‖ q) in nats from points of the true density, and its standard error: the mean of log p(x) − log q(x).

    This is the test NLL minus the exact entropy, with log p as the control variate that takes most of the sampling
    noise out of it.
    """
    gap = torch.cat([true.log_prob(chunk) - log_prob(chunk).cpu().double() for chunk in x.split(10_000)])
    return gap.mean().item(), gap.std().item() / math.sqrt(len(gap))


@torch.no_grad()
def round_trip_errors(flow: Flow, points: Tensor) -> Tensor:
    """The largest error of any coordinate of x → noise → x, for each of the points: ``(n, D)`` → ``(n,)``."""
    errors = []
    for x in points.split(10_000):
        errors.append((flow.decode(flow.encode(x)) - x).abs().amax(1))
    return torch.cat(errors).cpu()


@torch.no_grad()
def score_density(flow: Flow, true: Density, test_points: int) -> dict[str, float]:
    """KL(true ‖ flow) and the NLL on fresh points, in nats, and the error of x → noise → x.

    nll = entropy + kl.
    """
    points = true.sample(test_points)
    kl, stderr = divergence(true, flow.log_prob, points)
    errors = round_trip_errors(flow, points)
    return {
        "nll": true.entropy + kl,
        "nll_floor": true.entropy,
        "kl": kl,
        "kl_stderr": stderr,
        "round_trip": errors.median().item(),
        "round_trip_worst": errors.max().item(),
    }


@torch.no_grad()
def on_grid(density: Flow | Density, size: int = 250) -> Tensor:
    """The density at the centres of a ``size × size`` grid over (0, 1)², row by row along the second axis."""
    centre = (torch.arange(size) + 0.5) / size
    x, y = torch.meshgrid(centre, centre, indexing="xy")
    points = torch.stack((x.flatten(), y.flatten()), 1).to(device_of(density))
    return density.log_prob(points).exp().view(size, size).cpu()


# Flows of images


@torch.no_grad()
def log_likelihoods(
    flow: Flow, images: Tensor, context: Tensor | None, draws: int = 1, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """log p of each image in nats: bytes ``(n, height, width)`` → ``(n,)``, with dequantisation noise fixed in advance.

    With K ``draws`` of the noise u it is log (1/K) Σ_k p((x + u_k) / 255), which from below approaches log p of the
    image's bin times 255^D, its exact discrete probability: ``bits_per_dim`` counts the 255^D.

    With ``share`` (k, P), only those of the k-th of P processes, with the noise that they would have had without it.
    """
    device = device_of(flow)
    generator = torch.Generator(device).manual_seed(EVALUATION_SEED)
    scores = []
    contexts = itertools.repeat(None) if context is None else context.split(CHUNK)
    mine = slice(share[0], None, share[1])
    for chunk, given in zip(images.split(CHUNK), contexts, strict=False):
        chunk = chunk.to(device)
        given = None if given is None else given[mine].to(device)
        each = [flow.log_prob(dequantize(chunk, generator)[mine], given) for _ in range(draws)]
        scores.append(torch.stack(each).logsumexp(0) - math.log(draws))
    return torch.cat(scores)


def standard_error(scores: Tensor, dimensions: int) -> float:
    """Of the mean of log-likelihoods in nats, in bits per dimension."""
    return scores.std(correction=0).item() / math.sqrt(len(scores)) / (dimensions * math.log(2))


# The VAE


@torch.no_grad()
def elbo_terms(vae: VAE, images: Tensor, draws: int = 1) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each image in nats, ``(n,)``, means over ``draws`` of z, with noise fixed in advance."""
    device = device_of(vae)
    terms = []
    with seeded(EVALUATION_SEED, device):
        for chunk in images.split(CHUNK):
            each = [torch.stack(vae.terms(chunk.to(device))) for _ in range(draws)]
            terms.append(torch.stack(each).mean(0).cpu())
    reconstruction, kl = torch.cat(terms, dim=1).double()
    return reconstruction, kl


def mean_elbo(vae: VAE, images: Tensor) -> float:
    reconstruction, kl = elbo_terms(vae, images)
    return (reconstruction - kl).mean().item()


@torch.no_grad()
def importance_gaps(vae: VAE, images: Tensor, samples: int) -> Tensor:
    """By how much log p(x) exceeds the ELBO, of each image, ``(n,)``: log (1/K) Σ_k w_k − (1/K) Σ_k log w_k.

    w_k = p(x, z_k) / q(z_k | x) at K ``samples`` z_k of q. The first term is a lower bound of log p(x) that tightens
    with K (Burda et al., 2016).
    """
    device = device_of(vae)
    gaps = []
    with seeded(EVALUATION_SEED, device):
        for chunk in images.split(max(1, ROWS // samples)):
            log_weights = vae.log_weights(chunk.to(device), samples).cpu().double()
            gaps.append(log_weights.logsumexp(0) - math.log(samples) - log_weights.mean(0))
    return torch.cat(gaps)


@torch.no_grad()
def draws_of_both(vae: VAE, test: Tensor) -> tuple[Tensor, Tensor]:
    """As many draws of the aggregate posterior (1/N) Σ_n q(z | x_n) as there are test images, and of the prior."""
    device = device_of(vae)
    with seeded(EVALUATION_SEED, device):
        posterior = torch.cat([vae.encoder(chunk.to(device)).sample().cpu() for chunk in test[:MATCHED].split(CHUNK)])
        return posterior, vae.prior().sample((len(posterior),)).cpu()


def two_sample_accuracy(one: Tensor, other: Tensor, epochs: int = 30) -> float:
    """Held-out accuracy of a network that tells draws of two distributions apart: 0.5 if they are the same, at most 1.

    A classifier two-sample test (Lopez-Paz & Oquab, 2017): half of the draws train it, the other half are judged.
    """
    x = torch.cat((one, other))
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    y = torch.cat((torch.ones(len(one)), torch.zeros(len(other))))
    with seeded(EVALUATION_SEED, x.device), torch.enable_grad():
        train, judged = torch.randperm(len(x)).tensor_split(2)
        network = nn.Sequential(
            nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)
        )
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train))].split(256):
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(network(x[rows]), y[rows]).backward()
                optimizer.step()
        return ((network(x[judged]) > 0).float() == y[judged]).double().mean().item()
