"""What the test data say of a trained model, with noise that is fixed in advance: the same model, the same score."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters.flow import Flow
from adapters.vae import VAE
from runs.common.densities import Density
from runs.common.devices import device_of, seeded
from runs.common.images import bits_per_dim, context_for, dequantize
from runs.common.progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

TEST_POINTS = 100_000  # fresh points of a density in the plane
POINTS = 10_000  # of them scored at once
EVALUATION_SEED = 0  # of the noise on validation and test images: always the same
CHUNK = 500  # images scored at once
ELBO_DRAWS = 10  # of z for each test image
ROWS = 5_000  # draws of z scored at once, for the importance weights
MATCHED = 10_000  # draws of the prior, and as many of the posterior, for the classifier of the two-sample test


# Densities in the plane


@torch.no_grad()
def divergence(true: Density, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """KL(true ‖ q) in nats from points of the true density, and its standard error: the mean of log p(x) − log q(x).

    This is the test NLL minus the exact entropy, with log p as the control variate that takes most of the sampling
    noise out of it.
    """
    gaps = []
    with progress(len(x), "scoring: KL", "point") as bar:
        for chunk in x.split(POINTS):
            gaps.append(true.log_prob(chunk) - log_prob(chunk).cpu().double())
            bar.update(len(chunk))
    gap = torch.cat(gaps)
    return gap.mean().item(), gap.std().item() / math.sqrt(len(gap))


@torch.no_grad()
def round_trip_errors(flow: Flow, points: Tensor) -> Tensor:
    """The largest error of any coordinate of x → noise → x, for each of the points: ``(n, D)`` → ``(n,)``."""
    errors = []
    with progress(len(points), "scoring: round trip", "point") as bar:
        for x in points.split(POINTS):
            errors.append((flow.decode(flow.encode(x)) - x).abs().amax(1))
            bar.update(len(x))
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
        "test_points": test_points,
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

    With K ``draws`` of the noise u it is log (1/K) Σ_k p((x + u_k) / 255). As K grows, its mean rises to the logarithm
    of 255^D times the image's exact discrete probability; ``bits_per_dim`` accounts for the factor 255^D.

    With ``share`` (k, P) only every P-th image from the k-th on is scored, for the k-th of P processes. The noise is
    the same as without it.
    """
    device = device_of(flow)
    generator = torch.Generator(device).manual_seed(EVALUATION_SEED)
    scores = []
    contexts = itertools.repeat(None) if context is None else context.split(CHUNK)
    mine = slice(share[0], None, share[1])
    with progress(draws * len(images), "scoring", "image", quiet=share[0] > 0) as bar:
        for chunk, chunk_context in zip(images.split(CHUNK), contexts, strict=False):
            chunk = chunk.to(device)
            chunk_context = None if chunk_context is None else chunk_context[mine].to(device)
            log_probs = []
            for _ in range(draws):
                log_probs.append(flow.log_prob(dequantize(chunk, generator)[mine], chunk_context))
                bar.update(len(chunk))
            scores.append(torch.stack(log_probs).logsumexp(0) - math.log(draws))
    return torch.cat(scores)


def score_images(flow: Flow, images: Tensor, labels: Tensor, importance: int = 0) -> dict[str, float]:
    """What held-out images say: the mean NLL in nats, and bits per dimension with the mean's standard error.

    Args:
        flow: of dequantised images, ``(n, D)``.
        images: bytes ``(n, height, width)``.
        labels: their classes, for a conditional flow.
        importance: draws of dequantisation noise for an image's importance-weighted bits per dimension; 0 for none.
    """
    context, dimensions = context_for(flow, labels), images[0].numel()
    scores = log_likelihoods(flow, images, context).cpu().double()
    nll = -scores.mean().item()
    metrics = {
        "bits_per_dim": bits_per_dim(nll, dimensions),
        "bits_per_dim_stderr": standard_error(scores, dimensions),
        "nll": nll,
        "test_images": len(images),
    }
    if importance:
        scores = log_likelihoods(flow, images, context, importance).cpu().double()
        metrics |= {
            "bits_per_dim_importance": bits_per_dim(-scores.mean().item(), dimensions),
            "bits_per_dim_importance_stderr": standard_error(scores, dimensions),
            "importance_samples": importance,
        }
    return metrics


def shared_bits_per_dim(flow: Flow, images: Tensor, labels: Tensor, accelerator: "Accelerator") -> float:
    """Mean bits per dimension of held-out images; several processes share the work, and all get the same figure."""
    share = (accelerator.process_index, accelerator.num_processes)
    scores = log_likelihoods(flow, images, context_for(flow, labels), share=share)
    total = accelerator.reduce(scores.sum(), "sum")
    assert isinstance(total, Tensor)  # as what went in
    return bits_per_dim(-total.item() / len(images), images[0].numel())


def standard_error(scores: Tensor, dimensions: int | None = None) -> float:
    """Of the mean of scores in nats: in nats, or in bits per dimension if their number is given."""
    nats = scores.std(correction=0).item() / math.sqrt(len(scores))
    return nats if dimensions is None else nats / (dimensions * math.log(2))


# The VAE


def score_vae(
    vae: VAE, test: Tensor, train: Tensor, importance_samples: int, importance_images: int
) -> tuple[dict[str, float], Tensor]:
    """Test ELBO and its terms, log p(x), all in nats per image, and how well prior and aggregate posterior match.

    Each comes with its standard error: over the test images, or over the draws that the classifier has not seen.

    log p(x) is the ELBO over all images plus the mean gap over some of them, evenly spaced in the test set. The gap
    differs little from image to image, unlike log p(x) itself, so few images give its mean.

    Args:
        vae: the model.
        test: images, ``(n, D)``.
        train: training images, for their ELBO.
        importance_samples: draws of z for an image's log p(x).
        importance_images: how many test images say how large the gap is.

    Returns:
        the metrics, and the ELBO of each test image.
    """
    reconstruction, kl = elbo_terms(vae, test, ELBO_DRAWS, doing="scoring: ELBO")
    elbo = reconstruction - kl
    chosen = torch.linspace(0, len(test) - 1, min(importance_images, len(test))).round().long()
    gaps = importance_gaps(vae, test[chosen], importance_samples)
    elbo_train = mean_elbo(vae, train)
    posterior, prior = draws_of_both(vae, test)
    match = two_sample_accuracy(posterior, prior)
    metrics = {
        "elbo": elbo.mean().item(),
        "elbo_stderr": standard_error(elbo),
        "reconstruction": reconstruction.mean().item(),
        "reconstruction_stderr": standard_error(reconstruction),
        "kl": kl.mean().item(),
        "kl_stderr": standard_error(kl),
        "log_likelihood": (elbo.mean() + gaps.mean()).item(),
        "log_likelihood_stderr": math.hypot(standard_error(elbo), standard_error(gaps)),
        "test_images": len(test),
        "importance_samples": importance_samples,
        "importance_images": len(chosen),
        "prior_match": match,
        "prior_match_stderr": math.sqrt(match * (1 - match) / len(posterior)),  # half of both draws are held out
        "elbo_train": elbo_train,
    }
    return metrics, elbo


def gain(elbo: Tensor, reference: Tensor) -> dict[str, float]:
    """By how much one VAE's ELBOs exceed another's on the same images, in nats, and the mean's standard error.

    An image that is hard for one is hard for the other, so that this error is smaller than either ELBO's own.
    """
    return {"elbo_gain": (elbo - reference).mean().item(), "elbo_gain_stderr": standard_error(elbo - reference)}


def mean_over_seeds(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds; ``interrupted`` if any seed was.

    For what is estimated there are also, of several seeds, the standard deviation over them, and the mean's standard
    error over them in place of that over the test images.
    """
    interrupted = any(found.get("interrupted") for found in metrics)
    metrics = [{key: value for key, value in found.items() if key != "interrupted"} for found in metrics]
    means = {key: statistics.fmean(found[key] for found in metrics) for key in metrics[0]}
    means = {key: int(mean) if isinstance(metrics[0][key], int) else mean for key, mean in means.items()}
    if len(metrics) > 1:
        for key in [key for key in means if f"{key}_stderr" in means]:
            deviation = statistics.stdev(found[key] for found in metrics)
            means |= {f"{key}_std": deviation, f"{key}_stderr": deviation / math.sqrt(len(metrics))}
    return means | {"seeds": len(metrics)} | ({"interrupted": True} if interrupted else {})


@torch.no_grad()
def elbo_terms(vae: VAE, images: Tensor, draws: int = 1, doing: str | None = None) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each image in nats, ``(n,)``, means over ``draws`` of z, with noise fixed in advance.

    If ``doing`` says what is being done, a progress bar with these words appears when it takes long.
    """
    device = device_of(vae)
    terms = []
    with (
        seeded(EVALUATION_SEED, device),
        progress(len(images), doing or "", "image", quiet=doing is None) as bar,
    ):
        for chunk in images.split(CHUNK):
            drawn = [torch.stack(vae.terms(chunk.to(device))) for _ in range(draws)]
            terms.append(torch.stack(drawn).mean(0).cpu())
            bar.update(len(chunk))
    reconstruction, kl = torch.cat(terms, dim=1).double()
    return reconstruction, kl


def mean_elbo(vae: VAE, images: Tensor) -> float:
    """The ELBO in nats per image, with one draw of z for each, and noise fixed in advance."""
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
    with seeded(EVALUATION_SEED, device), progress(len(images), "scoring: log p(x)", "image") as bar:
        for chunk in images.split(max(1, ROWS // samples)):
            log_weights = vae.log_weights(chunk.to(device), samples).cpu().double()
            gaps.append(log_weights.logsumexp(0) - math.log(samples) - log_weights.mean(0))
            bar.update(len(chunk))
    return torch.cat(gaps)


@torch.no_grad()
def draws_of_both(vae: VAE, test: Tensor) -> tuple[Tensor, Tensor]:
    """As many draws of the aggregate posterior (1/N) Σ_n q(z | x_n) as there are test images, and of the prior."""
    device = device_of(vae)
    with seeded(EVALUATION_SEED, device):
        posterior = torch.cat([vae.encoder(chunk.to(device)).sample().cpu() for chunk in test[:MATCHED].split(CHUNK)])
        return posterior, vae.prior().sample((len(posterior),)).cpu()


def two_sample_accuracy(first: Tensor, second: Tensor, epochs: int = 30) -> float:
    """Held-out accuracy of a network that classifies draws by their distribution, 0.5 to 1: 0.5 if these are the same.

    This is a classifier two-sample test (Lopez-Paz & Oquab, 2017): half of the draws train the network, and the other
    half measure its accuracy.
    """
    x = torch.cat((first, second))
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    y = torch.cat((torch.ones(len(first)), torch.zeros(len(second))))
    with (
        seeded(EVALUATION_SEED, x.device),
        torch.enable_grad(),
        progress(epochs, "scoring: prior and posterior", "epoch") as bar,
    ):
        train, held_out = torch.randperm(len(x)).tensor_split(2)
        network = nn.Sequential(
            nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)
        )
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train))].split(256):
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(network(x[rows]), y[rows]).backward()
                optimizer.step()
            bar.update()
        return ((network(x[held_out]) > 0).float() == y[held_out]).double().mean().item()
