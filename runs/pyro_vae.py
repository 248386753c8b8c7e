"""Train the course's VAE in Pyro under one prior or all: is the test ELBO better, do prior and posterior match?

python runs/pyro_vae.py
python runs/pyro_vae.py --prior all
python runs/pyro_vae.py --prior gaussian --latent 2
python runs/pyro_vae.py --flow zuko-nsf --layers 4
python runs/pyro_vae.py --benchmark    what Pyro costs
"""

import copy
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from adapters import build_flow, save_flow
from adapters.checkpoint import write_atomically
from adapters.checks import check_positive
from adapters.flow import Flow
from adapters.priors import FlowPrior, MixturePrior, StandardNormalPrior, VampPrior
from adapters.vae import VAE, Decoder, Encoder
from runs.common.command_line import cli
from runs.common.devices import can_fuse, device_of, make_accelerator, seeded
from runs.common.fit import fit
from runs.common.images import DATASETS, SHAPE, Batches, Images, binarize, load_images, mosaic, threshold, warped
from runs.common.objectives import NegativeELBO
from runs.common.options import check_at_most, check_flow, check_known, check_seed, check_widths
from runs.common.pictures import figures
from runs.common.recipe import Recipe
from runs.common.results import open_directory, parameter_count, to_plain, write_metrics
from runs.common.samples import decoded_samples
from runs.common.scores import (
    EVALUATION_SEED,
    draws_of_both,
    elbo_terms,
    importance_gaps,
    mean_elbo,
    two_sample_accuracy,
)
from runs.common.timing import interleaved, ratio
from runs.common.training_state import STATE, Fitted, check_resumable

PIXELS = math.prod(SHAPE)
RESULTS = Path("results/pyro_vae")
DRAWS = 10  # of z for each test image, for the ELBO
BINARIZE = {"threshold": threshold, "dynamic": binarize}
POSTERIORS = ("gaussian", "flow")
# Arguments that a resumed training may change: they don't touch the weights.
FREE = ("prior", "seeds", "data_dir", "out", "resume", "save_every", "importance_samples", "importance_images")
FREE += ("device", "compile")  # they change the weights' rounding alone

# Best published test ELBO for this exercise, pixels > 0.5, each prior with its own best M.
PUBLISHED = {"gaussian": -81.76, "mog": -80.84, "flow": -76.59}


class Given(NamedTuple):
    """What a prior may be made of."""

    latent: int
    encoder: Encoder
    flow: Callable[[], Flow]
    images: Tensor


PRIORS = {
    "gaussian": lambda given: StandardNormalPrior(given.latent),
    "mog": lambda given: MixturePrior(given.latent, len(given.images)),
    "vamp": lambda given: VampPrior(given.encoder, given.images),
    "flow": lambda given: FlowPrior(given.flow()),
}
NAMES = {"gaussian": "Gaussian", "mog": "mixture", "vamp": "Vamp", "flow": "flow"}


class Trained(NamedTuple):
    """A VAE, how its training went, and what the test set says."""

    vae: VAE
    fitted: Fitted
    metrics: dict[str, float]


def main(
    prior: str = "flow",
    flow: str = "masked-affine",
    latent: int = 32,
    layers: int = 8,
    hidden: tuple[int, ...] = (128, 128),
    options: dict[str, bool | int | float | str] | None = None,
    width: tuple[int, ...] = (512, 512),
    dropout: float = 0.0,
    components: int = 100,
    posterior: str = "gaussian",
    binarize: str = "threshold",
    augment: float = 0.0,
    dataset: str = "MNIST",
    data_dir: Path | None = None,
    epochs: int = 25,
    batch_size: int = 128,
    lr: float = 1e-3,
    warmup: float = 0.05,
    decay: float = 0.3,
    kl_warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    average: float | None = 0.999,
    seconds: float | None = None,
    patience: int | None = None,
    precision: str = "no",
    importance_samples: int = 500,
    importance_images: int = 1000,
    limit: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    out: Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    benchmark: bool = False,
    device: str = "auto",
    compile: bool = False,
) -> dict[str, dict[str, float]]:
    """Train a Bernoulli VAE by Pyro's Trace_ELBO, score it on the test set, and hold prior against posterior.

    Args:
        prior: gaussian, mog (a mixture of Gaussians), vamp, flow, or all of them one after the other.
        flow: the flow prior: any name of adapters.flow_names(), e.g. masked-affine, nflows-rqs, zuko-nsf.
        latent: M, the width of z.
        layers: layers of the flow.
        hidden: widths of the hidden layers of each of the flow's networks.
        options: what else build_flow takes for this flow, e.g. --options dropout 0.1 activation gelu.
        width: widths of the encoder's hidden layers, and of the decoder's.
        dropout: in encoder and decoder.
        components: of the mixture and the VampPrior.
        posterior: gaussian, or flow: the encoder's normal, then the same kind of flow, conditional on the image.
        binarize: threshold (pixels > 0.5) or dynamic (a fresh draw in each epoch).
        augment: turn, stretch, shear and shift each training image, anew in each epoch, so that less is learned by
            heart: by up to 6 degrees, 6 %, 0.06 and a pixel for 1. It follows the learning rate: the training ends
            on the images as they are. 0 for none.
        dataset: MNIST, FashionMNIST, KMNIST or QMNIST; all but MNIST are downloaded unless they are there.
        data_dir: where the data sets are kept; by default the user's cache.
        epochs: passes over the training images.
        batch_size: images in a batch, over all processes.
        lr: learning rate.
        warmup: share of the training, at its start, over which the rate rises to lr.
        decay: share of the training, at its end, over which the rate falls to 0.
        kl_warmup: epochs over which the KL's weight in the training rises from 0 to 1, in the progress bar's ELBO,
            too; 0 for none.
        weight_decay: of AdamW.
        clip: largest norm of the gradient of the ELBO per image; None for no clipping.
        average: decay of the moving average of the weights that is evaluated and saved; None for none.
        seconds: end each training after so much time, if that comes before the last epoch.
        patience: end after so many epochs without a better validation ELBO.
        precision: no (float32), bf16 or fp16, for the training.
        importance_samples: draws of z for an image's importance-weighted log p(x).
        importance_images: test images that tell by how much log p(x) exceeds the ELBO.
        limit: use only so many images of each split, for a quick look.
        seed: of weights, order and noise.
        seeds: train with so many seeds, from that one on.
        out: directory for metrics, pictures and checkpoints; by default results/pyro_vae/PRIOR-FLOW.
        resume: go on with the trainings in that directory, after a crash or Ctrl-C.
        save_every: seconds between checkpoints.
        benchmark: train nothing; time a step against the same ELBO in plain PyTorch.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
        compile: make the training step faster by torch.compile and, on CUDA, by one graph of the whole step.
    """
    arguments = dict(locals())
    check_known((*PRIORS, "all"), prior=prior)
    check_flow(flow, options)
    check_known(POSTERIORS, posterior=posterior)
    check_known(BINARIZE, binarize=binarize)
    check_known(DATASETS, dataset=dataset)
    check_positive(latent=latent, layers=layers, components=components, epochs=epochs, batch_size=batch_size)
    check_positive(importance_samples=importance_samples, importance_images=importance_images, seeds=seeds)
    check_at_most(100_000, importance_samples=importance_samples)
    check_at_most(1_000, seeds=seeds)
    check_widths(hidden=hidden, width=width)
    if limit is not None:
        check_positive(limit=limit)
    recipe = Recipe(
        steps=1,  # and validate_every: known when the images are
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        decay=decay,
        clip=clip,
        average=average,
        patience=patience,
        seconds=seconds,
        precision=precision,
        save_every=save_every,
        compile=compile,
    )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie between 0 and 1, not {dropout}")
    check_seed(seed)
    if not 0 <= augment < math.inf:
        raise ValueError(f"augment must be 0 (none) or positive, not {augment}")
    if not 0 <= kl_warmup < math.inf:
        raise ValueError(f"kl_warmup must be 0 (none) or positive, not {kl_warmup}")
    if augment and seconds is not None:
        raise ValueError("augment follows the rate, which seconds leave open: give epochs instead of seconds")

    def make_flow(context_features: int | None = None) -> Flow:
        return build_flow(flow, latent, context_features, layers=layers, hidden_features=hidden, **(options or {}))

    def make_vae(name: str, images: Tensor) -> VAE:
        posterior_flow = make_flow(2 * latent) if posterior == "flow" else None
        encoder = Encoder(latent, PIXELS, width, dropout, posterior_flow)
        made = PRIORS[name](Given(latent, encoder, make_flow, images))
        return VAE(made, encoder, Decoder(latent, PIXELS, width[::-1], dropout))

    names = list(PRIORS) if prior == "all" else [prior]
    if "flow" in names or posterior == "flow":
        make_flow()  # it may refuse: now rather than after the other priors' trainings
    accelerator = make_accelerator(device, precision)
    if benchmark:
        return measure(lambda: make_vae("flow", torch.rand(components, PIXELS)), batch_size, accelerator.device)
    out = out or RESULTS / "-".join([prior] + [flow] * (prior in ("flow", "all")))
    jobs = [(name, one) for one in range(seed, seed + seeds) for name in names]
    if resume:
        check_resumable(out / "{}-{}".format(*jobs[0]))
    out = open_directory(out)
    arguments["out"] = out
    with accelerator.local_main_process_first():
        images = load_images(dataset, data_dir).first(limit)
    prepare = BINARIZE[binarize]

    def augmented(chosen: Tensor, epoch: float, generator: torch.Generator) -> Tensor:
        return warped(chosen, augment * recipe.rate(epoch / epochs) / lr, generator)

    def kl_weight(epoch: float) -> float:
        return 1.0 if epoch >= kl_warmup else max(1e-3, epoch / kl_warmup)  # Pyro takes no 0

    share = (accelerator.process_index, accelerator.num_processes)
    validation, test = (
        prepare(part, torch.Generator().manual_seed(EVALUATION_SEED)) for part in (images.validation, images.test)
    )
    trained: dict[tuple[str, int], Trained] = {}
    for name, one in jobs:
        torch.manual_seed(one)
        batches = Batches(
            images.train, None, batch_size, one, accelerator.device, share, prepare, augmented if augment else None
        )
        steps = epochs * batches.per_epoch
        chosen = torch.randperm(len(images.train))[: min(components, len(images.train))]
        vae = make_vae(name, prepare(images.train[chosen], torch.Generator().manual_seed(one))).to(accelerator.device)
        directory = out / f"{name}-{one}"
        identity = to_plain({key: value for key, value in arguments.items() if key not in FREE})
        parameters = parameter_count(vae)
        accelerator.print(
            f"{NAMES[name]} prior{f' ({flow})' * (name == 'flow')}, seed {one}: M = {latent}, "
            f"{parameters:,} parameters, {len(images.train):,} images of {dataset}, {steps:,} steps of "
            f"{batch_size}, on {accelerator.device}"
        )
        fitted = train(
            vae,
            batches,
            kl_weight,
            replace(recipe, steps=steps, validate_every=batches.per_epoch),
            validation,
            directory,
            resume,
            identity | {"prior": name, "seed": one},
            accelerator,
        )
        if not accelerator.is_main_process:
            if fitted.interrupted:
                break
            continue
        # while the KL weighs less, the training loss is no ELBO, and not for the picture
        fitted.losses = [(step, loss) for step, loss in fitted.losses if kl_weight(step / batches.per_epoch) == 1.0]
        places = [directory, out] if one == seed else [directory]
        save(vae, *places)
        metrics = evaluate(vae, images, test, prepare, importance_samples, importance_images) | {
            "elbo_validation": -min(value for _, value in fitted.validation),
            "parameters": parameters,
            "steps": fitted.steps,
            "train_seconds": round(fitted.seconds, 2),
            "images_per_second": round(fitted.steps * batch_size / max(fitted.seconds, 1e-9), 1),
        }
        if fitted.interrupted:
            metrics["interrupted"] = True
        trained[name, one] = Trained(vae, fitted, metrics)
        print(
            f"elbo {metrics['elbo']:.2f}   reconstruction {metrics['reconstruction']:.2f}   kl {metrics['kl']:.2f}   "
            f"prior_match {metrics['prior_match']:.3f}   ({metrics['train_seconds']:.0f} s of training, "
            f"{metrics['images_per_second']:,.0f} images/s)"
        )
        if fitted.interrupted:
            break
    if not accelerator.is_main_process:
        return {}
    metrics = {
        name: over_seeds([trained[name, one].metrics for one in range(seed, seed + seeds) if (name, one) in trained])
        for name in names
        if (name, seed) in trained
    }
    write_metrics(out, "pyro_vae", arguments, seed, metrics)
    answer(metrics, published=binarize == "threshold" and dataset == "MNIST")
    first = {name: trained[name, seed] for name in metrics}
    pictures = draw(first, test, images.test_labels, out, seed)
    print("\n".join(f"  {path}" for path in pictures))
    return metrics


def train(
    vae: VAE,
    batches: Batches,
    kl_weight: Callable[[float], float],
    recipe: Recipe,
    validation: Tensor,
    directory: Path,
    resume: bool,
    identity: dict,
    accelerator: Accelerator,
) -> Fitted:
    """Fit it, without Pyro's checks: ``fit`` itself stops at what is not finite."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)
        try:
            return fit(
                NegativeELBO(vae),
                lambda step: (batches(step)[0], torch.tensor(kl_weight(step / batches.per_epoch))),
                recipe,
                validate=lambda: -mean_elbo(vae, validation),
                describe=lambda loss: f"ELBO {-loss:.2f} nats",
                directory=directory,
                resume=resume and (directory / STATE).is_file(),
                identity=identity,
                save_weights=lambda: save(vae, directory),
                accelerator=accelerator,
            )
        finally:
            accelerator.free_memory()
            vae.eval()


def save(vae: VAE, *directories: Path) -> Path:
    """Write all weights to the first directory, and the flow prior, if it is one, to all: ``load_flow`` opens them."""
    for directory in directories:
        if isinstance(vae.prior, FlowPrior):
            save_flow(vae.prior.flow, directory)
    path = directories[0] / "vae.safetensors"
    on_cpu = copy.deepcopy(vae).cpu()
    return write_atomically(path, lambda unfinished: safetensors.torch.save_model(on_cpu, str(unfinished)))


# What the test set says


def evaluate(
    vae: VAE, images: Images, test: Tensor, prepare: Callable, importance_samples: int, importance_images: int
) -> dict[str, float]:
    """Test ELBO and its terms, log p(x), and how well prior and aggregate posterior match.

    log p(x) is the ELBO over all images plus the mean gap over some of them, evenly spaced in the test set. The gap
    differs little from image to image, unlike log p(x) itself, so few images give its mean.
    """
    reconstruction, kl = elbo_terms(vae, test, DRAWS)
    elbo = reconstruction - kl
    some = torch.linspace(0, len(test) - 1, min(importance_images, len(test))).round().long()
    gaps = importance_gaps(vae, test[some], importance_samples)
    train = prepare(images.train[: len(images.validation)], torch.Generator().manual_seed(EVALUATION_SEED))
    posterior, prior = draws_of_both(vae, test)
    return {
        "elbo": elbo.mean().item(),
        "elbo_stderr": elbo.std(correction=0).item() / math.sqrt(len(elbo)),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "log_likelihood": (elbo.mean() + gaps.mean()).item(),
        "importance_samples": importance_samples,
        "importance_images": len(some),
        "prior_match": two_sample_accuracy(posterior, prior),
        "elbo_train": mean_elbo(vae, train),
    }


def over_seeds(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds and, for what is estimated, standard deviations; ``interrupted`` if any seed was."""
    interrupted = any(one.get("interrupted") for one in metrics)
    metrics = [{key: value for key, value in one.items() if key != "interrupted"} for one in metrics]
    means = {key: statistics.fmean(one[key] for one in metrics) for key in metrics[0]}
    means = {key: int(mean) if isinstance(metrics[0][key], int) else mean for key, mean in means.items()}
    if len(metrics) > 1:
        for key in ("elbo", "reconstruction", "kl", "log_likelihood", "prior_match"):
            means[f"{key}_std"] = statistics.stdev(one[key] for one in metrics)
    return means | ({"interrupted": True} if interrupted else {})


def answer(metrics: dict[str, dict[str, float]], published: bool) -> None:
    """The exercise's two questions, answered; a prior whose training was cut short is shown, and not compared."""
    several = any("elbo_std" in found for found in metrics.values())
    columns = ("elbo", "reconstruction", "kl", "log_likelihood", "prior_match")
    print(f"\n{'test, nats per image':<22}" + "".join(f"{column:>18}" for column in columns))
    for name, found in metrics.items():
        cells = []
        for column in columns:
            digits = 3 if column == "prior_match" else 2
            deviation = f" ± {found[f'{column}_std']:.{digits}f}" if f"{column}_std" in found else ""
            cells.append(f"{found[column]:.{digits}f}{deviation}")
        label = NAMES[name] + " (interrupted)" * found.get("interrupted", False)
        print(f"{label:<22}" + "".join(f"{cell:>18}" for cell in cells))
    some = next(iter(metrics.values()))
    print(
        f"log_likelihood from {some['importance_samples']} importance samples on {some['importance_images']} images; "
        + ("mean ± standard deviation over the seeds" if several else "one seed; --seeds 3 for the spread")
    )
    metrics = {name: found for name, found in metrics.items() if not found.get("interrupted")}
    if not metrics:
        print("\nThe training was cut short: --resume goes on with it.")
        return
    print("\nIs the test ELBO better?")

    def compare(reference: float, than: str) -> None:
        for name in (name for name in metrics if name != "gaussian"):
            gain = metrics[name]["elbo"] - reference
            print(f"  {NAMES[name]}: {abs(gain):.2f} nats {'better' if gain > 0 else 'worse'} than {than}")

    if list(metrics) == ["gaussian"]:
        print("  this is the prior to compare with: --prior all trains the others too")
    elif "gaussian" in metrics:
        compare(metrics["gaussian"]["elbo"], "the Gaussian prior")
    elif published:
        best = PUBLISHED["gaussian"]
        compare(best, f"the best published with a Gaussian prior ({best}); --prior all trains that one too")
    else:
        print("  --prior all trains the Gaussian prior too, to compare with")
    print("Do prior and aggregate posterior match?")
    for name, found in metrics.items():
        print(
            f"  {NAMES[name]}: a classifier tells their draws apart in {100 * found['prior_match']:.1f} % of cases "
            "(50 %: they match)"
        )


# What Pyro costs


def measure(make: Callable[[], VAE], batch_size: int, device: torch.device, rounds: int = 200) -> dict[str, float]:
    """Median ratio of a training step by Pyro's Trace_ELBO to one of the same ELBO in plain PyTorch."""
    torch.manual_seed(0)
    vae = make().to(device)
    x = (torch.rand(batch_size, PIXELS) > 0.8).float().to(device)
    loss, one = NegativeELBO(vae), torch.tensor(1.0, device=device)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-5, fused=can_fuse(device))

    def plain() -> Tensor:
        loc, log_scale = vae.encoder.network(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        log_q = -(0.5 * noise.square() + log_scale + 0.5 * math.log(2 * math.pi)).sum(1)
        log_p = -binary_cross_entropy_with_logits(vae.decoder.network(z), x, reduction="none").sum(1)
        return -(log_p + vae.prior.flow.log_prob(z) - log_q).mean()

    def step(function: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        function().backward()
        optimizer.step()

    with pyro.validation_enabled(False):
        times = interleaved(
            {"pyro": lambda: step(lambda: loss((x, one))), "plain": lambda: step(plain)}, rounds, device, warmup=20
        )
    found = {"step_ratio": ratio(times["pyro"], times["plain"])} | {
        f"{name}_ms": statistics.median(each) for name, each in times.items()
    }
    print(
        f"a training step of {batch_size} images: {found['pyro_ms']:.2f} ms by Trace_ELBO, {found['plain_ms']:.2f} ms "
        f"in plain PyTorch, {found['step_ratio']:.3f} times as long (median of {rounds} pairs)"
    )
    return found


# Pictures


def draw(trained: dict[str, Trained], test: Tensor, labels: Tensor, out: Path, seed: int) -> list[Path]:
    """All pictures, of the first seed's trainings."""
    made = {name: decoded_samples(one.vae, seed) for name, one in trained.items()}
    planes = {name: Plane(one.vae, test, labels) for name, one in trained.items()}
    pictures = [draw_training(trained, out)]
    for name, one in trained.items():
        pictures += [
            figures.image_grid(out / f"samples-{name}.png", made[name].numpy(), columns=10),
            draw_reconstructions(one.vae, test, out / f"reconstructions-{name}.png"),
            draw_match(planes[name], one.metrics["prior_match"], out / f"match-{name}.png"),
        ]
    if len(trained) > 1:
        pictures.append(draw_priors(trained, planes, made, out))
    return pictures


@torch.no_grad()
def draw_reconstructions(vae: VAE, test: Tensor, path: Path, columns: int = 12) -> Path:
    """Test images above the means of p(x | z), z a draw of q(z | x)."""
    x = test[:: max(1, len(test) // columns)][:columns]
    with seeded(EVALUATION_SEED, device_of(vae)):
        again = vae.decoder(vae.encoder(x.to(device_of(vae))).sample()).mean.cpu()
    rows = torch.cat((x, again)).view(-1, *SHAPE).numpy()
    return figures.image_grid(path, rows, len(x), ["x", "p(x | z)"])


def draw_training(trained: dict[str, Trained], out: Path) -> Path:
    """Training and validation ELBO."""
    path = out / "elbo.png"
    with figures.figure(path, size=(6, 3.4)) as (_, axes):
        every = []
        for colour, (name, one) in zip(figures.SERIES, trained.items(), strict=False):
            steps, losses = zip(*one.fitted.losses, strict=True) if one.fitted.losses else ((), ())
            axes.plot(steps, [-loss for loss in losses], color=colour, alpha=0.3, linewidth=0.7)
            steps, losses = zip(*one.fitted.validation, strict=True)
            label = f"{NAMES[name]}, test {one.metrics['elbo']:.1f}"
            axes.plot(steps, [-loss for loss in losses], "o-", color=colour, markersize=3, linewidth=1, label=label)
            every += [-loss for loss in losses]
        low, high = np.quantile(every, 0.15), max(every)
        margin = 0.2 * (high - low) + 1
        axes.set(xlabel="step", ylabel="ELBO (nats per image)", ylim=(low - margin, high + 1.5 * margin))
        axes.legend(title="validation (training faint)", loc="lower right")
    return path


class Plane:
    """Prior and aggregate posterior in the plane of z, or along the latter's first two principal components.

    Attributes:
        posterior, prior: draws, ``(n, 2)``; labels: of the posterior's.
        density: the prior's density in the plane, on a grid over ``extent``: exact for two latent dimensions; from many
            smoothed draws of the prior otherwise.
    """

    def __init__(self, vae: VAE, test: Tensor, labels: Tensor, points: int = 3_000, size: int = 120):
        posterior, prior = draws_of_both(vae, test)
        centre, axes = torch.zeros(posterior.shape[1]), torch.eye(*posterior.shape[1:], posterior.shape[1])
        self.names = ("$z_1$", "$z_2$")
        if posterior.shape[1] > 2:
            centre = posterior.mean(0)
            axes = torch.linalg.eigh(torch.cov((posterior - centre).T))[1].flip(1)
            self.names = ("first principal component", "second principal component")
        axes = axes[:, :2]

        def project(z: Tensor) -> np.ndarray:
            flat = (z - centre) @ axes
            return nn.functional.pad(flat, (0, 2 - flat.shape[1])).numpy()

        self.posterior, self.prior, self.labels = project(posterior[:points]), project(prior[:points]), labels[:points]
        reach = 1.1 * np.quantile(np.abs(np.concatenate((self.posterior, self.prior))), 0.998)
        self.extent = (-reach, reach, -reach, reach)
        device = device_of(vae)
        if posterior.shape[1] == 2:
            edge = (torch.arange(size) + 0.5) / size * 2 * reach - reach
            y, x = torch.meshgrid(edge, edge, indexing="ij")
            with torch.no_grad():
                grid = vae.prior().log_prob(torch.stack((x.flatten(), y.flatten()), 1).to(device)).exp()
            self.density = grid.view(size, size).cpu().numpy()
        else:
            with torch.no_grad():
                many = project(torch.cat([vae.prior().sample((10_000,)).cpu() for _ in range(20)]))
            counts = np.histogram2d(many[:, 1], many[:, 0], bins=size, range=[(-reach, reach)] * 2)[0]
            self.density = smooth(counts)


def smooth(values: np.ndarray, width: float = 1.6) -> np.ndarray:
    """Convolve with a Gaussian of so many cells, along both axes."""
    reach = np.arange(-int(4 * width), int(4 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    for axis in (0, 1):
        values = np.apply_along_axis(np.convolve, axis, values, kernel / kernel.sum(), mode="same")
    return values


def draw_match(plane: Plane, told: float, path: Path) -> Path:
    """The aggregate posterior, and draws of the prior, each over the prior's density."""
    with figures.figure(path, 1, 2, size=(7.6, 3.9), sharex=True, sharey=True) as (drawing, axes):
        show_plane(axes[0], plane, "aggregate posterior, by class", posterior=True)
        show_plane(axes[1], plane, "prior")
        drawing.supxlabel(plane.names[0], fontsize=9, color=figures.INK)
        drawing.supylabel(plane.names[1], fontsize=9, color=figures.INK)
        drawing.suptitle(
            f"over the prior's density; a classifier tells them apart in {100 * told:.1f} % of cases (50 %: a match)",
            fontsize=9, color=figures.FAINT,
        )  # fmt: skip
    return path


def show_plane(axes, plane: Plane, title: str, posterior: bool = False) -> None:
    axes.imshow(
        plane.density, origin="lower", extent=plane.extent, cmap="Greys", vmin=0, vmax=1.6 * plane.density.max(),
        interpolation="bilinear", aspect="equal",
    )  # fmt: skip
    points, how = plane.prior, {"color": figures.ACCENT}
    if posterior:
        points, how = plane.posterior, {"c": plane.labels.numpy(), "cmap": "tab10", "vmin": -0.5, "vmax": 9.5}
    axes.scatter(points[:, 0], points[:, 1], s=2.2, alpha=0.6, linewidths=0, **how)
    for label in plane.labels.unique().tolist() if posterior else ():
        middle = np.median(points[plane.labels.numpy() == label], axis=0)
        axes.text(*middle, label, **figures.OUTLINED)
    axes.set(xlim=plane.extent[:2], ylim=plane.extent[2:], title=title)


def draw_priors(trained: dict[str, Trained], planes: dict[str, Plane], made: dict[str, Tensor], out: Path) -> Path:
    """A column for each prior: aggregate posterior over its density, its own draws, and what they decode to."""
    path = out / "priors.png"
    columns = len(trained)
    with figures.figure(path, 3, columns, size=(2.5 * columns + 0.4, 7.6), squeeze=False) as (_, axes):
        for column, (name, one) in zip(axes.T, trained.items(), strict=True):
            show_plane(column[0], planes[name], f"{NAMES[name]}: ELBO {one.metrics['elbo']:.1f}", posterior=True)
            show_plane(column[1], planes[name], f"told apart: {100 * one.metrics['prior_match']:.0f} %")
            column[2].imshow(mosaic(made[name][:49].numpy(), 7), cmap="gray", vmin=0, vmax=1)
            column[2].set_axis_off()
        for row, label in zip(axes, ("aggregate posterior", "prior", ""), strict=True):
            row[0].set_ylabel(label)
    return path


if __name__ == "__main__":
    cli(main)
