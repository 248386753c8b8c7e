"""Fit a flow to images, say its bits per dimension on the test set, and draw what it has learned.

python runs/mnist.py --mask chequerboard                   exercise 2.5: 1.37 bits/dim, 4 min on two cores
python runs/mnist.py --mask random                         the same with random masks: 1.35 bits/dim, 4 min
python runs/mnist.py --limit 500 --epochs 1                a quick look, seconds
python runs/mnist.py --flow my_layer.py:MyLayer            your own layer
python runs/mnist.py --load results/mnist                  draw the pictures of the newest run again
python runs/mnist.py --load results/mnist --samples 36     the same with new samples, in its directory again/
accelerate launch --num_processes 2 runs/mnist.py          on two GPUs
torchrun --nproc_per_node 2 runs/mnist.py                  as two processes, on CPUs too
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters import checkerboard_mask, random_mask, save_flow
from adapters.catalogue import flow_options, is_own
from adapters.checks import check_positive
from adapters.masks import pyramid_masks
from adapters.preprocess import Logit, Marginals
from runs.common.command_line import cli
from runs.common.devices import make_accelerator, peak_device_memory
from runs.common.fit import fit
from runs.common.images import CLASSES, HIGH, SHAPE, Batches, Images, context_for, load_images, standardize
from runs.common.objectives import BitsPerDim
from runs.common.options import (
    Checked,
    EpochOptions,
    FlowOptions,
    ImageOptions,
    ImageRunOptions,
    NamesAndValues,
    check_at_most,
    check_known,
    check_load,
    flat,
    identity,
)
from runs.common.pictures.mnist import SAMPLES, Camera, MnistRecord, draw_again
from runs.common.recipe import Recipe
from runs.common.results import parameter_count, peak_memory, replacing_results, write_metrics
from runs.common.samples import Sampling
from runs.common.scores import score_images, shared_bits_per_dim
from runs.common.training_state import Fitted

if TYPE_CHECKING:
    from accelerate import Accelerator  # which takes long to import

RESULTS = Path("results/mnist")
SAMPLES_OF_FEW = 25  # under --limit
LAYERS = 8  # unless the masks say how many
HIDDEN = {"mlp": (512, 512), "conv": (64, 64, 64)}  # widths or channels
USUAL = {"activation": "gelu", "dropout": 0.1}  # where the flow has them and nothing else is asked for
PREPROCESS: dict[str, Callable[[Tensor], Transform | None]] = {
    "none": lambda images: None,
    "affine": standardize,
    "logit": lambda images: Logit(alpha=1e-6, high=HIGH),
    "marginals": Marginals.of,
}


def chequerboard_masks(layers: int, seed: int) -> list[Tensor]:
    """The chequerboard and its inverse, in turn."""
    mask = checkerboard_mask(*SHAPE).flatten()
    return [mask, 1 - mask]


def random_masks(layers: int, seed: int) -> list[Tensor]:
    """A random half for each layer, drawn once; the checkpoint keeps them."""
    generator = torch.Generator().manual_seed(seed)
    return [random_mask(math.prod(SHAPE), generator) for _ in range(layers)]


MASKS = {
    "chequerboard": chequerboard_masks,
    "random": random_masks,
    "pyramid": lambda layers, seed: pyramid_masks(*SHAPE),
}


@dataclass(frozen=True)
class MnistFlowOptions(FlowOptions):
    """Which flow is trained, and how large it is."""

    mask: str = "chequerboard"
    """chequerboard (inverted at every layer), random (one draw a layer) or pyramid (coarse to fine)."""

    net: str = "mlp"
    """the networks of a hand-written flow: mlp or conv."""

    preprocess: str = "marginals"
    """the flow's first transform: none (the dequantised pixels as they are), affine (zero mean and unit deviation over
    all pixels), logit or marginals (each pixel's histogram to a normal)."""

    conditional: bool = False
    """model p(image | class) instead of p(image)."""

    layers: int | None = None
    """layers of the flow; by default 8, or one for each mask of the pyramid."""

    hidden: tuple[int, ...] | None = None
    """widths of each network's hidden layers, or its channels; by default 512 512 and 64 64 64."""

    options: NamesAndValues = None
    """what else build_flow takes for this flow, e.g. --options dropout 0.2 bins 24; unless said, activation is gelu
    and, where the flow has it, dropout 0.1."""

    def check(self) -> None:
        super().check()
        check_known(MASKS, mask=self.mask)
        check_known(HIDDEN, net=self.net)
        check_known(PREPROCESS, preprocess=self.preprocess)
        if self.net != "mlp" and "net" not in flow_options(self.flow):
            raise ValueError(f"net {self.net} is for hand-written flows; {self.flow} has its own networks")

    def completed(self) -> "MnistFlowOptions":
        """The same, with what suits the masks, the networks and the flow where nothing else was asked for."""
        known = ("activation", *flow_options(self.flow))
        usual = {name: value for name, value in USUAL.items() if name in known}
        return replace(
            self,
            layers=self.layers or (len(pyramid_masks(*SHAPE)) if self.mask == "pyramid" else LAYERS),
            hidden=self.hidden or HIDDEN[self.net],
            options=usual | (self.options or {}),
        )


@dataclass(frozen=True)
class MnistTrainingOptions(EpochOptions):
    """How the weights are trained."""

    weight_decay: float = 1e-3
    """the weight decay of the optimiser, AdamW."""

    clip: float | None = 1.0
    """largest norm of the gradient of the bits/dim; None for no clipping."""

    accumulate: int = 1
    """batches in an optimiser step."""

    seed: int = 0
    """the seed of weights, masks, order and noise."""

    def in_steps(self, batches: int, run: ImageRunOptions) -> Recipe:
        """How ``fit`` trains when an epoch has so many batches."""
        if self.accumulate > self.epochs * batches:
            raise ValueError(
                f"accumulate {self.accumulate} is more than the {self.epochs * batches} batches of the training"
            )
        return self.recipe(
            run,
            steps=max(1, self.epochs * batches // self.accumulate),
            validate_every=max(1, batches // self.accumulate),
        )


@dataclass(frozen=True)
class EvaluationOptions(Checked):
    """How a trained flow is scored and sampled."""

    samples: int | None = None
    """images in the sample grid; by default 100, or 25 under --limit; with --load as many as the run's own."""

    temperature: float = 1.0
    """factor on the base's noise for all samples; below 1 they are likelier and less diverse."""

    importance: int = 0
    """draws of dequantisation noise per test image for the importance-weighted bits/dim; 0 leaves them out."""

    def check(self) -> None:
        samples = 1 if self.samples is None else self.samples
        check_positive(samples=samples, temperature=self.temperature)
        check_at_most(10_000, samples=samples, importance=self.importance)
        if self.importance < 0:
            raise ValueError(f"importance must not be negative, but is {self.importance}")

    def completed(self, limit: int | None) -> "EvaluationOptions":
        """The same with a number of samples: fewer under ``--limit``, since some flows make them slowly."""
        return replace(self, samples=self.samples or (SAMPLES if limit is None else SAMPLES_OF_FEW))


@dataclass(frozen=True)
class MnistRunOptions(ImageRunOptions):
    """Where a run computes, and where its data and results are. None of this changes what is learned."""

    out: Path | None = None
    """directory for metrics, pictures and checkpoints; by default results/mnist/DATASET-MASK-FLOW-NET."""

    load: Path | None = None
    """train nothing; draw the pictures of the run in this directory again, there or in --out. With another --samples,
    --temperature or --seed than the run's own they go to its directory again/, and a flow of your own is to be named by
    --flow again."""

    track: str | None = None
    """also log to one of accelerate's trackers, e.g. tensorboard, in that directory."""

    def check(self) -> None:
        super().check()
        if self.track is not None:
            from accelerate.tracking import get_available_trackers  # here, as importing accelerate takes long
            from accelerate.utils import LoggerType

            check_known([str(kind.value) for kind in LoggerType if kind != LoggerType.ALL], track=self.track)
            if self.track not in {str(kind.value) for kind in get_available_trackers()}:
                raise ImportError(f"--track {self.track} needs the package {self.track}: pip install {self.track}")

    def accelerator(self, precision: str, out: Path) -> "Accelerator":
        """Device, processes and tracker; a ValueError for a device or precision that can't be had here."""
        accelerator = make_accelerator(self.device, precision, log_with=self.track, project_dir=out)
        if self.track is not None:
            accelerator.init_trackers("mnist")
        return accelerator


@dataclass(frozen=True)
class Options(Checked):
    """Everything that a run can be asked for."""

    images: ImageOptions = field(default_factory=ImageOptions)
    flow: MnistFlowOptions = field(default_factory=MnistFlowOptions)
    training: MnistTrainingOptions = field(default_factory=MnistTrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: MnistRunOptions = field(default_factory=MnistRunOptions)

    def check(self) -> None:
        if self.run.load is not None:
            own = ["flow"] * is_own(self.flow.flow)  # whose code is imported, and no other's
            check_load(self, "load", "out", "samples", "temperature", "seed", "device", *own)

    def name(self) -> str:
        """Of the directory that results go to unless ``--out`` names one."""
        parts = [self.images.dataset.lower(), self.flow.mask, self.flow.file_name(), self.flow.net]
        return "-".join(parts + ["conditional"] * self.flow.conditional)


def main(options: Options, *, read: Callable[..., Images] = load_images, draw: bool = True) -> dict[str, float]:
    """Fit a flow to images by maximum likelihood, score it, and draw samples.

    Args:
        options: what the command line asks for.
        read: gives the images, as ``load_images`` does.
        draw: whether to draw the pictures.
    """
    training, seed = options.training, options.training.seed
    if options.run.load is not None:
        own = options.flow.flow if is_own(options.flow.flow) else None
        draw_again(options.run, options.evaluation.samples, options.evaluation.temperature, seed, own)
        return {}
    evaluation = options.evaluation.completed(options.images.limit)
    options = replace(options, flow=options.flow.completed(), evaluation=evaluation)
    sampling = Sampling(evaluation.samples or SAMPLES, evaluation.temperature, seed)
    size = math.prod(SHAPE), CLASSES if options.flow.conditional else None
    masks = MASKS[options.flow.mask](options.flow.layers, seed)
    options.flow.try_own(*size, masks=masks)
    out = options.run.directory(RESULTS / options.name())
    accelerator = options.run.accelerator(training.precision, out)
    with accelerator.local_main_process_first():  # the others find the files that the first one fetched
        images = read(options.images.dataset, options.run.data_dir).first(options.images.limit)

    torch.manual_seed(seed)
    flow = options.flow.build(
        *size,
        masks=masks,
        preprocess=PREPROCESS[options.flow.preprocess](images.train.flatten(1)),
        **({} if options.flow.net == "mlp" else {"net": options.flow.net}),
    ).to(accelerator.device)
    context = context_for(flow, images.train_labels)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(images.train, context, training.batch_size, seed, accelerator.device, share)
    recipe = training.in_steps(batches.per_epoch, options.run)
    accelerator.print(
        f"{options.flow.flow} ({options.flow.net}, {options.flow.mask}): {options.flow.layers} layers, "
        f"{parameter_count(flow):,} parameters, {len(images.train):,} images of {options.images.dataset}, "
        f"{recipe.steps:,} steps of {training.batch_size * training.accumulate}, on {accelerator.device}"
    )

    camera = Camera(flow, sampling)
    fitted = fit(
        BitsPerDim(flow),
        batches,
        recipe,
        validate=lambda: shared_bits_per_dim(flow, images.validation, images.validation_labels, accelerator),
        describe="{:.3f} bits/dim".format,
        observe=camera if accelerator.is_main_process else None,
        directory=out,
        resume=options.run.resume,
        identity=identity(options),
        save_weights=lambda: replacing_results(save_flow(flow, out), out),
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        accelerator.end_training()
        return {}
    replacing_results(save_flow(flow.eval(), out), out)

    if options.images.limit is not None:
        print(f"--limit {options.images.limit}: {len(images.test):,} test images, {sampling.samples} samples")
    metrics = score_images(flow, images.test, images.test_labels, evaluation.importance)
    metrics["bits_per_dim_validation"] = min(value for _, value in fitted.validation)
    metrics |= {"parameters": parameter_count(flow)} | fitted.metrics()
    metrics |= costs(batches, fitted, recipe, accelerator.device)
    write_metrics(out, "mnist", flat(options) | {"out": out}, seed, metrics)
    report(metrics)

    print("drawing its pictures")  # which can take a while: samples of some flows cost one pass for each pixel
    record = MnistRecord.of(images, options.images.dataset, fitted, camera)
    record.save(out)
    if draw:
        print("\n".join(f"  {path}" for path in record.draw(out)))
    if not fitted.interrupted:
        options.run.remove_states(out)
    accelerator.end_training()
    return metrics


def costs(batches: Batches, fitted: Fitted, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Images a second (validation and checkpoints included), the share of a step that its data take, and memory.

    On a GPU, whose work is only queued, the share is that of the queueing.
    """
    step = fitted.seconds / max(1, fitted.steps)
    data = batches.seconds / max(1, batches.served) * recipe.accumulate
    found = {
        "images_per_second": round(batches.size * recipe.accumulate / step, 1) if step else 0.0,
        "data_share": round(data / step, 5) if step else 0.0,
        "peak_memory_mib": round(peak_memory(), 1),
    }
    on_device = peak_device_memory(device)
    return found if on_device is None else found | {"peak_device_memory_mib": round(on_device, 1)}


def report(metrics: dict[str, float]) -> None:
    """Say the figures."""
    print(
        f"bits_per_dim {metrics['bits_per_dim']:.4f} ± {metrics['bits_per_dim_stderr']:.4f} (test)   "
        f"{metrics['bits_per_dim_validation']:.4f} (validation)   nll {metrics['nll']:.2f} nats"
    )
    if "importance_samples" in metrics:
        print(
            f"importance-weighted {metrics['bits_per_dim_importance']:.4f} ± "
            f"{metrics['bits_per_dim_importance_stderr']:.4f} bits/dim with {metrics['importance_samples']} draws"
        )
    print(
        f"{metrics['steps']:,} steps in {metrics['train_seconds']:.0f} s: "
        f"{metrics['images_per_second']:,.0f} images/s, "
        f"data {100 * metrics['data_share']:.1f} %, {metrics['peak_memory_mib']:,.0f} MiB at most"
    )


if __name__ == "__main__":
    cli(main, Options)
