"""Train the course's VAE in Pyro under one prior or all: is the test ELBO better, do prior and posterior match?

python runs/pyro_vae.py                               a flow as prior: test ELBO −73.8 nats, 5 min
python runs/pyro_vae.py --prior all                   exercise 2.6: four priors in one table, 20 min
python runs/pyro_vae.py --limit 500 --epochs 1        a quick look, seconds
python runs/pyro_vae.py --prior gaussian --latent 2   a latent space that can be looked at
python runs/pyro_vae.py --flow zuko-nsf --layers 4    another flow as prior
python runs/pyro_vae.py --flow my_layer.py:MyLayer    your own layer
python runs/pyro_vae.py --load results/pyro_vae       draw the pictures of the newest run again
python runs/pyro_vae.py --benchmark                   what Pyro costs: a step beside one in plain PyTorch
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from adapters import save_flow
from adapters.checkpoint import write_atomically
from adapters.checks import check_positive
from adapters.flow import Flow
from adapters.priors import FlowPrior, MixturePrior, StandardNormalPrior, VampPrior
from adapters.vae import VAE, Decoder, Encoder
from runs.common.command_line import cli
from runs.common.devices import make_accelerator
from runs.common.fit import fit
from runs.common.images import SHAPE, Batches, Images, binarize, load_images, threshold, warped
from runs.common.objectives import NegativeELBO, without_argument_checks
from runs.common.options import (
    Checked,
    EpochOptions,
    FlowOptions,
    ImageOptions,
    ImageRunOptions,
    check_at_most,
    check_known,
    check_load,
    check_none_or_positive,
    check_widths,
    flat,
    identity,
)
from runs.common.pictures.pyro_vae import PriorRecord, VAERecord
from runs.common.pictures.record import draw_again
from runs.common.recipe import Recipe
from runs.common.results import open_directory, parameter_count, replacing_results, write_metrics
from runs.common.scores import EVALUATION_SEED, gain, mean_elbo, mean_over_seeds, score_vae
from runs.common.training_state import STATE, Fitted, check_resumable
from runs.common.vae_benchmark import ROUNDS, benchmark
from runs.common.vae_report import report, title

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

PIXELS = math.prod(SHAPE)
RESULTS = Path("results/pyro_vae")
BINARIZE = {"threshold": threshold, "dynamic": binarize}
POSTERIORS = ("gaussian", "flow")
TEST_IMAGES = 10_000  # of MNIST: fewer, by --limit, are scored with less effort


class Ingredients(NamedTuple):
    """What a prior may be made of.

    Attributes:
        latent: M, the width of z.
        encoder: of the same VAE.
        flow: makes the flow that the options ask for.
        images: some training images, binarised, ``(components, D)``.
    """

    latent: int
    encoder: Encoder
    flow: Callable[[], Flow]
    images: Tensor


# A prior of one's own is a line here; ``--prior all`` trains all of them in this order.
PRIORS: dict[str, Callable[[Ingredients], torch.nn.Module]] = {
    "gaussian": lambda ingredients: StandardNormalPrior(ingredients.latent),
    "mog": lambda ingredients: MixturePrior(ingredients.latent, len(ingredients.images)),
    "vamp": lambda ingredients: VampPrior(ingredients.encoder, ingredients.images),
    "flow": lambda ingredients: FlowPrior(ingredients.flow()),
}


@dataclass(frozen=True)
class VAEImageOptions(ImageOptions):
    """Which images there are to learn from."""

    binarize: str = "threshold"
    """threshold (pixels > 0.5) or dynamic (a fresh draw in each epoch)."""

    augment: float = 0.0
    """how far each training image is turned, stretched, sheared and shifted, anew in each epoch, so that less is
    learned by heart: 1 is by up to 6 degrees, 6 %, 0.06 and 1 pixel, 0 not at all. It follows the learning rate: the
    training ends on the images as they are."""

    def check(self) -> None:
        super().check()
        check_known(BINARIZE, binarize=self.binarize)
        check_none_or_positive(augment=self.augment)

    def of_the_exercise(self) -> bool:
        """Whether they are all of MNIST, pixels > 0.5."""
        return (self.dataset, self.binarize, self.limit) == ("MNIST", "threshold", None)

    def prepare(self, images: Tensor, seed: int) -> Tensor:
        """Binarised once: bytes ``(n, 28, 28)`` → floats ``(n, D)``."""
        return BINARIZE[self.binarize](images, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class ModelOptions(FlowOptions):
    """Which model is trained, and how large it is."""

    prior: str = "flow"
    """gaussian, mog (a mixture of Gaussians), vamp, flow, or all of them one after the other."""

    flow: str = "masked-affine"
    """the flow prior: a name that python -m adapters lists, e.g. zuko-nsf, or your own, e.g. my_layer.py:MyLayer."""

    latent: int = 32
    """M, how many numbers z has."""

    layers: int = 8
    """layers of the flow."""

    hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden layers of each of the flow's networks."""

    width: tuple[int, ...] = (512, 512)
    """widths of the encoder's hidden layers, and of the decoder's."""

    dropout: float = 0.0
    """probability of dropping a hidden unit of encoder and decoder in training."""

    components: int = 100
    """how many components the mixture and the VampPrior have."""

    posterior: str = "gaussian"
    """gaussian, or flow: the encoder's normal, then the same kind of flow, conditional on the image."""

    def check(self) -> None:
        super().check()
        check_known((*PRIORS, "all"), prior=self.prior)
        check_known(POSTERIORS, posterior=self.posterior)
        check_positive(latent=self.latent, components=self.components)
        check_widths(width=self.width)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, not {self.dropout}")

    def priors(self) -> list[str]:
        """The names of all that are to be trained."""
        return list(PRIORS) if self.prior == "all" else [self.prior]

    def vae(self, prior: str, images: Tensor) -> VAE:
        """A new VAE under the prior of that name, which may be made of images, ``(components, D)``."""
        posterior_flow = self.build(self.latent, 2 * self.latent) if self.posterior == "flow" else None
        encoder = Encoder(self.latent, PIXELS, self.width, self.dropout, posterior_flow)
        made = PRIORS[prior](Ingredients(self.latent, encoder, partial(self.build, self.latent), images))
        return VAE(made, encoder, Decoder(self.latent, PIXELS, self.width[::-1], self.dropout))

    def try_flows(self) -> None:
        """Before any work: try somebody's own flow as what it is to be, a prior, a posterior or both."""
        if "flow" in self.priors():
            self.try_own(self.latent)
        if self.posterior == "flow":
            self.try_own(self.latent, 2 * self.latent)

    def trial_vae(self, prior: str) -> VAE:
        """The same, made of noise: it shows whether such a VAE can be made, and how long its steps take."""
        return self.vae(prior, torch.rand(min(self.components, 1_000), PIXELS).round())


@dataclass(frozen=True)
class VAETrainingOptions(EpochOptions):
    """How the weights are trained."""

    epochs: int = 25
    """passes over the training images."""

    warmup: float = 0.05
    """share of the training, at its start, over which the rate rises to lr."""

    decay: float = 0.3
    """share of the training, at its end, over which the rate falls to 0."""

    kl_warmup: float = 0.0
    """epochs over which the KL's weight in the training rises from 0 to 1, in the progress bar's ELBO, too; 0 for
    none."""

    clip: float | None = None
    """largest norm of the gradient of the ELBO, in nats per image; None for no clipping."""

    def check(self) -> None:
        super().check()
        check_none_or_positive(kl_warmup=self.kl_warmup)

    def kl_weight(self, epoch: float) -> float:
        """The KL's weight in the training's loss when so many epochs have passed, 1.5 in the middle of the second."""
        return 1.0 if epoch >= self.kl_warmup else max(1e-3, epoch / self.kl_warmup)  # Pyro takes no 0


@dataclass(frozen=True)
class EvaluationOptions(Checked):
    """How a trained VAE is scored."""

    importance_samples: int | None = None
    """draws of z for an image's importance-weighted log p(x); by default 500, and fewer under --limit."""

    importance_images: int | None = None
    """test images that tell by how much log p(x) exceeds the ELBO; by default 1,000, and fewer under --limit."""

    def check(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        check_positive(**given)
        check_at_most(100_000, importance_samples=self.importance_samples or 0)

    def completed(self, limit: int | None) -> "EvaluationOptions":
        """The same with what suits so many test images, in proportion to their number, in place of None."""
        share = 1.0 if limit is None else min(1.0, limit / TEST_IMAGES)
        return replace(
            self,
            importance_samples=self.importance_samples or max(50, round(500 * share)),
            importance_images=self.importance_images or max(10, round(1_000 * share)),
        )


@dataclass(frozen=True)
class VAERunOptions(ImageRunOptions):
    """Where a run computes, and where its data and results are. None of this changes what is learned."""

    seeds: int = 1
    """train with so many seeds, from --seed on."""

    out: Path | None = None
    """directory for metrics, pictures and checkpoints; by default results/pyro_vae/PRIOR-FLOW."""

    benchmark: bool = False
    """train nothing; time a step against the same ELBO in plain PyTorch."""

    def check(self) -> None:
        super().check()
        check_positive(seeds=self.seeds)
        check_at_most(1_000, seeds=self.seeds)


@dataclass(frozen=True)
class Options(Checked):
    """Everything that a run can be asked for."""

    images: VAEImageOptions = field(default_factory=VAEImageOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: VAETrainingOptions = field(default_factory=VAETrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: VAERunOptions = field(default_factory=VAERunOptions)

    def check(self) -> None:
        if self.images.augment and self.training.seconds is not None:
            raise ValueError("augment follows the rate, which seconds leave open: give epochs instead of seconds")
        if self.run.load is not None:
            check_load(self, "load", "out")

    def trainings(self) -> "list[Options]":
        """The options of each single training, one for every seed and prior, with that seed and that prior in them."""
        seeds = range(self.training.seed, self.training.seed + self.run.seeds)
        return [
            replace(self, model=replace(self.model, prior=prior), training=replace(self.training, seed=seed))
            for seed in seeds
            for prior in self.model.priors()
        ]

    def name(self) -> str:
        """Of the directory of one training."""
        return f"{self.model.prior}-{self.training.seed}"


def main(
    options: Options, *, read: Callable[..., Images] = load_images, draw: bool = True, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Train a VAE by Pyro's Trace_ELBO, score it, and hold prior against posterior.

    Args:
        options: what the command line asks for.
        read: gives the images, as ``load_images`` does.
        draw: whether to draw the pictures.
        rounds: of the benchmark.
    """
    if options.run.load is not None:
        draw_again(VAERecord, options.run)
        return {}
    options = replace(options, evaluation=options.evaluation.completed(options.images.limit))
    model, training, evaluation, run = options.model, options.training, options.evaluation, options.run
    model.try_flows()
    for prior in model.priors():
        model.trial_vae(prior)  # what can't be made says so now, not after the trainings of other priors
    accelerator = make_accelerator(run.device, training.precision)
    if run.benchmark:
        torch.manual_seed(0)
        return benchmark(model.trial_vae("flow").to(accelerator.device), training.batch_size, rounds)
    with_flow = model.prior in ("flow", "all")
    out = run.out or RESULTS / "-".join([model.prior] + [model.file_name()] * with_flow)
    trainings = options.trainings()
    if run.resume:
        check_resumable(out, trainings[0].name())
    open_directory(out)
    with accelerator.local_main_process_first():  # the others find the files that the first one fetched
        images = read(options.images.dataset, run.data_dir).first(options.images.limit)
    train_part = images.train[: len(images.validation)]
    test, train_part = (options.images.prepare(part, EVALUATION_SEED) for part in (images.test, train_part))

    if options.images.limit is not None:
        accelerator.print(
            f"--limit {options.images.limit}: {len(test):,} test images, and log p(x) by "
            f"{evaluation.importance_samples} importance samples on {evaluation.importance_images} of them"
        )

    by_prior: dict[str, list[dict[str, float]]] = {}  # metrics, for one seed after the other
    reference: Tensor | None = None  # the ELBO of each test image under the Gaussian prior, which is the first one
    record = VAERecord({})
    for single in trainings:
        vae, fitted = train(single, images, out / single.name(), accelerator)
        if accelerator.is_main_process:
            prior, seed = single.model.prior, single.training.seed
            metrics, elbo = score_vae(vae, test, train_part, **vars(evaluation))
            metrics |= training_metrics(vae, fitted, training.batch_size)
            if prior == "gaussian":
                reference = elbo
            elif reference is not None:
                metrics |= gain(elbo, reference)
            by_prior.setdefault(prior, []).append(metrics)
            print(
                f"elbo {metrics['elbo']:.2f} ± {metrics['elbo_stderr']:.2f}   "
                f"reconstruction {metrics['reconstruction']:.2f}   "
                f"kl {metrics['kl']:.2f}   prior_match {metrics['prior_match']:.3f}   "
                f"({metrics['train_seconds']:.0f} s of training, {metrics['images_per_second']:,.0f} images/s)"
            )
            if seed == training.seed:
                save_prior(vae, out)
                shown = PriorRecord.of(title(prior), vae, fitted, metrics, test, images.test_labels, seed)
                record.priors[prior] = shown
        if fitted.interrupted:
            break
    if not accelerator.is_main_process:
        return {}

    means = {prior: mean_over_seeds(metrics) for prior, metrics in by_prior.items()}
    write_metrics(out, "pyro_vae", flat(options) | {"out": out}, training.seed, means)
    report(means, comparable=options.images.of_the_exercise())
    record.save(out)
    if draw:
        print("\n".join(f"  {path}" for path in record.draw(out)))
    if not any(found.get("interrupted") for found in means.values()):
        run.remove_states(*(out / single.name() for single in trainings))
    return means


def train(options: Options, images: Images, directory: Path, accelerator: "Accelerator") -> tuple[VAE, Fitted]:
    """One VAE, under one prior and from one seed, and how its training went."""
    model, training = options.model, options.training
    torch.manual_seed(training.seed)
    share = (accelerator.process_index, accelerator.num_processes)
    prepare = BINARIZE[options.images.binarize]
    batches = Batches(images.train, None, training.batch_size, training.seed, accelerator.device, share, prepare)
    steps = training.epochs * batches.per_epoch
    recipe = training.recipe(options.run, steps=steps, validate_every=batches.per_epoch)
    if options.images.augment:
        batches.augment = augmentation(options.images.augment, recipe, training.epochs)
    chosen = torch.randperm(len(images.train))[: model.components]
    vae = model.vae(model.prior, options.images.prepare(images.train[chosen], training.seed)).to(accelerator.device)
    validation = options.images.prepare(images.validation, EVALUATION_SEED)
    accelerator.print(
        f"{title(model.prior)} prior{f' ({model.flow})' * (model.prior == 'flow')}, seed {training.seed}: "
        f"M = {model.latent}, {parameter_count(vae):,} parameters, {len(images.train):,} images of "
        f"{options.images.dataset}, {steps:,} steps of {training.batch_size}, on {accelerator.device}"
    )
    with without_argument_checks():  # fit itself stops at what is not finite
        fitted = fit(
            NegativeELBO(vae),
            lambda step: (batches(step)[0], torch.tensor(training.kl_weight(step / batches.per_epoch))),
            recipe,
            validate=lambda: -mean_elbo(vae, validation),
            describe=lambda loss: f"ELBO {-loss:.2f} nats",
            directory=directory,
            resume=options.run.resume and (directory / STATE).is_file(),
            identity=identity(options),
            save_weights=lambda: replacing_results(save(vae, directory), directory.parent),
            accelerator=accelerator,
        )
    accelerator.free_memory()
    vae.eval()
    if accelerator.is_main_process:
        replacing_results(save(vae, directory), directory.parent)
    # While the KL weighs less, the training's loss is no ELBO, and the picture must not show it.
    fitted.losses = [pair for pair in fitted.losses if training.kl_weight(pair[0] / batches.per_epoch) == 1.0]
    return vae, fitted


def augmentation(amount: float, recipe: Recipe, epochs: int) -> Callable[..., Tensor]:
    """How ``Batches`` changes training images: by that amount at the highest learning rate, by less at a lower one."""
    return lambda images, epoch, generator: warped(images, amount * recipe.rate(epoch / epochs) / recipe.lr, generator)


def training_metrics(vae: VAE, fitted: Fitted, batch_size: int) -> dict[str, float]:
    """What a run's metrics say of a training."""
    return {
        "elbo_validation": -min(value for _, value in fitted.validation),
        "parameters": parameter_count(vae),
        "images_per_second": round(fitted.steps * batch_size / max(fitted.seconds, 1e-9), 1),
    } | fitted.metrics()


def save(vae: VAE, directory: Path) -> Path:
    """Write all weights, and a flow prior as ``load_flow`` opens it."""
    save_prior(vae, directory)
    path = directory / "vae.safetensors"
    on_cpu = copy.deepcopy(vae).cpu()
    return write_atomically(path, lambda unfinished: safetensors.torch.save_model(on_cpu, str(unfinished)))


def save_prior(vae: VAE, directory: Path) -> None:
    """Write the flow prior, if it is one."""
    if isinstance(vae.prior, FlowPrior):
        save_flow(vae.prior.flow, directory)


if __name__ == "__main__":
    cli(main, Options)
