"""Fit a flow to images, say its bits per dimension on the test set, and draw what it has learned.

python runs/mnist.py --mask checker
python runs/mnist.py --mask random
python runs/mnist.py --load results/mnist --samples 100
accelerate launch --num_processes 2 runs/mnist.py --mask checker    on two GPUs
torchrun --nproc_per_node 2 runs/mnist.py --mask checker            as two processes, on CPUs too
"""

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor

from adapters import build_flow, checkerboard_mask, load_flow, random_mask, save_flow
from adapters.catalogue import flow_options
from adapters.checkpoint import FILE
from adapters.checks import check_positive
from adapters.flow import Flow
from adapters.masks import pyramid_masks
from adapters.preprocess import Logit, Marginals, Standardize
from runs.common.command_line import cli
from runs.common.devices import choose_device, device_of, make_accelerator, peak_device_memory
from runs.common.fit import fit
from runs.common.images import (
    CLASSES,
    DATASETS,
    HIGH,
    LEVELS,
    SHAPE,
    Batches,
    Images,
    bits_per_dim,
    class_context,
    dequantize,
    load_images,
)
from runs.common.objectives import BitsPerDim
from runs.common.options import check_at_most, check_flow, check_known, check_seed, check_widths
from runs.common.pictures import figures
from runs.common.recipe import Recipe
from runs.common.results import newest_run, open_directory, parameter_count, peak_memory, to_plain, write_metrics
from runs.common.samples import base_noise, decode, in_turn, slerp
from runs.common.scores import EVALUATION_SEED, log_likelihoods, standard_error
from runs.common.training_state import Fitted, check_resumable

RESULTS = Path("results/mnist")
TRACKERS = tuple(str(kind.value) for kind in LoggerType if kind != LoggerType.ALL)
LAYERS = 8  # unless the masks say how many
HIDDEN = {"mlp": (512, 512), "conv": (64, 64, 64)}  # widths or channels
OPTIONS = {"activation": "gelu", "dropout": 0.1}  # where the flow has them and nothing else is asked for
# Arguments that a resumed training may change: they don't touch the weights.
FREE = ("data_dir", "out", "resume", "load", "track", "save_every", "samples", "temperature", "importance")
FREE += ("device", "compile")  # they change the weights' rounding alone

# Published bits per dimension on MNIST's test set, to compare with.
PUBLISHED = {"Real NVP, fully connected": 1.93, "MAF MoG": 1.52, "Glow, convolutional": 1.05}


def checker_masks(layers: int | None, seed: int) -> list[Tensor]:
    """The chequerboard and its inverse, in turn."""
    mask = checkerboard_mask(*SHAPE).flatten()
    return [mask, 1 - mask]


def random_masks(layers: int | None, seed: int) -> list[Tensor]:
    """A random half for each layer, drawn once; the checkpoint keeps them."""
    generator = torch.Generator().manual_seed(seed)
    return [random_mask(math.prod(SHAPE), generator) for _ in range(layers or LAYERS)]


def standardize(images: Tensor) -> Standardize:
    """Zero mean and unit deviation over all pixels together, after dequantisation: U(0, 1) adds 1/2 and 1/12.

    Not pixel by pixel: at the border some are black in all training images, and any ink there would be 800 deviations.
    """
    share = torch.bincount(images.flatten(), minlength=LEVELS + 1).double() / images.numel()
    level = torch.arange(LEVELS + 1, dtype=torch.float64)
    mean = (share * level).sum()
    deviation = ((share * (level - mean).square()).sum() + 1 / 12).sqrt()
    same = torch.ones(images.shape[1])
    return Standardize(same * (mean + 0.5).item() / LEVELS, same * deviation.item() / LEVELS)


MASKS = {"checker": checker_masks, "random": random_masks, "pyramid": lambda layers, seed: pyramid_masks(*SHAPE)}
PREPROCESS = {"logit": lambda images: Logit(alpha=1e-6, high=HIGH), "affine": standardize, "marginals": Marginals.of}


def main(
    mask: str = "checker",
    flow: str = "masked-affine",
    net: str = "mlp",
    dataset: str = "MNIST",
    data_dir: Path | None = None,
    preprocess: str = "marginals",
    conditional: bool = False,
    layers: int | None = None,
    hidden: tuple[int, ...] | None = None,
    options: dict[str, bool | int | float | str] | None = None,
    epochs: int = 7,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-3,
    clip: float | None = 1.0,
    average: float | None = 0.999,
    accumulate: int = 1,
    seconds: float | None = None,
    patience: int | None = None,
    precision: str = "no",
    limit: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    track: str | None = None,
    load: Path | None = None,
    samples: int = 100,
    temperature: float = 1.0,
    importance: int = 0,
    device: str = "auto",
    compile: bool = False,
) -> dict[str, float]:
    """Fit a flow to dequantised images by maximum likelihood, score it on the test set, and draw samples.

    Args:
        mask: checker (inverted at every layer), random (one draw a layer) or pyramid (coarse to fine).
        flow: any name of adapters.flow_names(), e.g. masked-affine, masked-spline, nflows-rqs.
        net: the networks of a hand-written flow: mlp or conv.
        dataset: MNIST, FashionMNIST, KMNIST or QMNIST; all but MNIST are downloaded unless they are there.
        data_dir: where the data sets are kept; by default the user's cache.
        preprocess: the flow's first transform: logit, affine (zero mean and unit deviation over all pixels) or
            marginals (each pixel's histogram to a normal).
        conditional: model p(image | class) instead of p(image).
        layers: layers of the flow; by default 8, or one for each mask of the pyramid.
        hidden: widths of each network's hidden layers, or its channels; by default 512 512 and 64 64 64.
        options: what else build_flow takes for this flow, e.g. --options dropout 0.2 bins 24; unless said, activation
            is gelu and, where the flow has it, dropout 0.1.
        epochs: passes over the training images.
        batch_size: images in a batch, over all processes.
        lr: peak learning rate.
        weight_decay: of AdamW.
        clip: largest norm of the gradient of the bits per dimension.
        average: decay of the moving average of the weights that is evaluated and saved; None for none.
        accumulate: batches in a step.
        seconds: end after so much training time, if that comes before the last epoch; the schedule is shortened to fit.
        patience: end after so many epochs without a better validation score.
        precision: no (float32), bf16 or fp16, for the training.
        limit: use only so many images of each split, for a quick look.
        seed: of weights, masks, order and noise.
        out: directory for metrics, pictures and checkpoints; by default results/mnist/DATASET-MASK-FLOW-NET.
        resume: go on with the training in that directory, after a crash or Ctrl-C.
        save_every: seconds between checkpoints.
        track: also log to one of accelerate's trackers, e.g. tensorboard, in that directory.
        load: train nothing; draw samples of the run in this directory.
        samples: images in the sample grid.
        temperature: factor on the base's noise for all samples; below 1 they are likelier and less diverse.
        importance: draws of dequantisation noise per test image for the importance-weighted bits per dimension.
        device: where to compute: auto (the fastest that there is), cpu, cuda, cuda:1, mps, …
        compile: make the training step faster by torch.compile and, on CUDA, by one graph of the whole step.
    """
    arguments = dict(locals())
    check_positive(samples=samples, temperature=temperature)
    check_at_most(10_000, samples=samples, importance=importance)
    if load is not None:
        check_load(arguments)
        return draw_again(load, out, samples, temperature, seed, device)
    check_known(MASKS, mask=mask)
    check_flow(flow, options)
    check_known(HIDDEN, net=net)
    check_known(DATASETS, dataset=dataset)
    check_known(PREPROCESS, preprocess=preprocess)
    choose_device(device)
    if net != "mlp" and "net" not in flow_options(flow):
        raise ValueError(f"net {net} is for hand-written flows; {flow} has its own networks")
    check_widths(hidden=hidden)
    hidden = hidden or HIDDEN[net]
    known = ("activation", *flow_options(flow))
    options = {name: value for name, value in OPTIONS.items() if name in known} | (options or {})
    check_positive(epochs=epochs, batch_size=batch_size)
    given = {"layers": layers, "limit": limit}
    check_positive(**{name: value for name, value in given.items() if value is not None})
    check_seed(seed)
    if importance < 0:
        raise ValueError(f"importance must not be negative, but is {importance}")
    recipe = Recipe(
        steps=1,  # and validate_every: known when the images are
        lr=lr,
        weight_decay=weight_decay,
        clip=clip,
        average=average,
        accumulate=accumulate,
        precision=precision,
        patience=patience,
        seconds=seconds,
        save_every=save_every,
        compile=compile,
    )
    out = out or RESULTS / "-".join([dataset, mask, flow, net] + ["conditional"] * conditional).lower()
    if resume:
        check_resumable(out)
    out = open_directory(out)
    masks = MASKS[mask](layers, seed)
    layers = layers or (len(masks) if mask == "pyramid" else LAYERS)
    arguments |= {"layers": layers, "hidden": hidden, "options": options, "out": out}  # as they were used
    accelerator = open_accelerator(device, precision, track, out)
    main_process = accelerator.is_main_process
    with accelerator.local_main_process_first():  # the others find the files that the first one fetched
        images = load_images(dataset, data_dir).first(limit)

    torch.manual_seed(seed)
    model = build_flow(
        flow,
        math.prod(SHAPE),
        context_features=CLASSES if conditional else None,
        layers=layers,
        hidden_features=hidden,
        masks=masks,
        preprocess=PREPROCESS[preprocess](images.train.flatten(1)),
        **({} if net == "mlp" else {"net": net}),
        **options,
    ).to(accelerator.device)
    context = class_context if conditional else lambda labels: None
    share = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(images.train, context(images.train_labels), batch_size, seed, accelerator.device, share)
    if accumulate > epochs * batches.per_epoch:
        raise ValueError(
            f"accumulate {accumulate} is more than the {epochs * batches.per_epoch} batches of the training"
        )
    recipe = replace(
        recipe,
        steps=max(1, epochs * batches.per_epoch // accumulate),
        validate_every=max(1, batches.per_epoch // accumulate),
    )
    parameters = parameter_count(model)
    accelerator.print(
        f"{flow} ({net}, {mask}): {layers} layers, {parameters:,} parameters, "
        f"{len(images.train):,} images of {dataset}, {recipe.steps:,} steps of {batch_size * accumulate}, "
        f"on {accelerator.device}"
    )

    def validation() -> float:
        scores = log_likelihoods(model, images.validation, context(images.validation_labels), share=share)
        total = accelerator.reduce(scores.sum(), "sum").item()
        return bits_per_dim(-total / len(images.validation), math.prod(SHAPE))

    camera = Camera(model, temperature, seed)
    fitted = fit(
        BitsPerDim(model),
        batches,
        recipe,
        validate=validation,
        describe="{:.3f} bits/dim".format,
        observe=camera if main_process else None,
        directory=out,
        resume=resume,
        identity=to_plain({name: value for name, value in arguments.items() if name not in FREE}),
        save_weights=lambda: save_flow(model, out),
        accelerator=accelerator,
    )
    if not main_process:
        accelerator.end_training()
        return {}
    model.eval()
    save_flow(model, out)
    metrics = evaluate(model, images, context, importance)
    metrics |= {
        "bits_per_dim_validation": min(value for _, value in fitted.validation),
        "parameters": parameters,
        "steps": fitted.steps,
        "train_seconds": round(fitted.seconds, 2),
    }
    if fitted.interrupted:
        metrics["interrupted"] = True
    metrics |= costs(batches, fitted, recipe, accelerator.device)
    write_metrics(out, "mnist", arguments, seed, metrics)
    say(metrics)
    pictures = draw(model, images, context, fitted, camera, out, dataset, samples, temperature, seed)
    print("\n".join(f"  {path}" for path in pictures))
    accelerator.end_training()
    return metrics


def open_accelerator(device: str, precision: str, track: str | None, out: Path) -> Accelerator:
    """Device, processes and tracker.

    Raises:
        ValueError: for a device, tracker or precision that is unknown or can't be had here.
        ImportError: for a tracker that is not installed.
    """
    if track is not None:
        check_known(TRACKERS, track=track)
        if track not in {str(kind.value) for kind in get_available_trackers()}:
            raise ImportError(f"--track {track} needs the package {track}: pip install {track}")
    accelerator = make_accelerator(device, precision, log_with=track, project_dir=out)
    if track is not None:
        accelerator.init_trackers("mnist")
    return accelerator


def evaluate(flow: Flow, images: Images, context: Callable, importance: int) -> dict[str, float]:
    """What the test set says: mean NLL in nats, bits per dimension with the mean's standard error."""
    test, given = images.test, context(images.test_labels)
    scores = log_likelihoods(flow, test, given).cpu().double()
    dimensions = test[0].numel()
    nll = -scores.mean().item()
    metrics = {
        "bits_per_dim": bits_per_dim(nll, dimensions),
        "bits_per_dim_stderr": standard_error(scores, dimensions),
        "nll": nll,
    }
    if importance:
        scores = log_likelihoods(flow, test, given, importance).cpu().double()
        metrics |= {
            "bits_per_dim_importance": bits_per_dim(-scores.mean().item(), dimensions),
            "bits_per_dim_importance_stderr": standard_error(scores, dimensions),
            "importance_samples": importance,
        }
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


def say(metrics: dict[str, float]) -> None:
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


# Pictures


class Camera:
    """Samples from the same noise through the training, ever less often; it stops if they take too long to draw."""

    def __init__(self, flow: Flow, temperature: float, seed: int, count: int = 10, patience: float = 1.0):
        self.flow = flow
        self.noise = base_noise(count, temperature, seed)
        self.context = in_turn(flow, count)
        self.patience = patience
        self.frames: dict[int, Tensor] = {}
        self.next = 10

    def __call__(self, step: int) -> None:
        if step >= self.next:
            started = time.monotonic()
            self.take(step)
            too_slow = time.monotonic() - started > self.patience  # an autoregressive flow: one pass for each pixel
            self.next = math.inf if too_slow else 2 * step

    def take(self, step: int) -> None:
        training = self.flow.training
        self.frames[step] = decode(self.flow.eval(), self.noise, self.context)
        self.flow.train(training)


def draw(
    flow: Flow,
    images: Images,
    context: Callable,
    fitted: Fitted,
    camera: Camera,
    out: Path,
    dataset: str,
    samples: int,
    temperature: float,
    seed: int,
) -> list[Path]:
    """All pictures of a finished training."""
    made = decode(flow, base_noise(samples, temperature, seed), in_turn(flow, samples))
    camera.take(fitted.steps)
    pictures = [
        draw_samples(made, out),
        draw_training(fitted, out, PUBLISHED if dataset == "MNIST" else {}),
        draw_progress(camera, out),
        draw_interpolations(flow, images.test, context(images.test_labels), out),
        draw_neighbours(made, images, out),
    ]
    if flow.context_features is not None:
        pictures.append(draw_classes(flow, images.classes, temperature, seed, out))
    return pictures


def draw_samples(made: Tensor, out: Path) -> Path:
    """A grid as square as it gets; classes of a conditional flow follow each other."""
    columns = math.ceil(math.sqrt(len(made)))
    return figures.image_grid(out / "samples.png", made.numpy(), columns)


def draw_training(fitted: Fitted, out: Path, published: dict[str, float]) -> Path:
    path = out / "training.png"
    with figures.figure(path, size=(6, 3.2)) as (_, axes):
        steps, values = zip(*fitted.losses, strict=True) if fitted.losses else ((), ())
        figures.curve(axes, steps, values, smooth=9, label="training")
        axes.plot(
            *zip(*fitted.validation, strict=True), "o-", color=figures.ACCENT, markersize=3, linewidth=1,
            label="validation",
        )  # fmt: skip
        every = torch.tensor([*values, *(value for _, value in fitted.validation)])
        low, high = every.min().item(), torch.quantile(every, 0.95).item()
        margin = 0.15 * (high - low) + 0.02
        axes.set(xlabel="step", ylabel="bits/dim", ylim=(low - margin, high + margin))
        for name, value in published.items():
            if low - margin < value < high + margin:
                figures.reference(axes, value, name)
        axes.legend()
    return path


def draw_progress(camera: Camera, out: Path, rows: int = 8) -> Path:
    """The same noise at several moments, a row each."""
    steps = sorted(camera.frames)
    chosen = sorted({steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)})
    frames = torch.cat([camera.frames[step] for step in chosen]).numpy()
    labels = [f"step {step:,}" for step in chosen]
    return figures.image_grid(out / "progress.png", frames, len(camera.noise), labels)


@torch.no_grad()
def draw_interpolations(
    flow: Flow, test: Tensor, context: Tensor | None, out: Path, rows: int = 8, columns: int = 10
) -> Path:
    """From one test image to another along the sphere between their noises; a class slides along with them."""
    rows = min(rows, len(test) // 2)
    device = device_of(flow)
    x = dequantize(test[: 2 * rows].to(device), torch.Generator(device).manual_seed(EVALUATION_SEED))
    given = None if context is None else context[: 2 * rows].to(device)
    noise = flow.encode(x, given)
    share = torch.linspace(0, 1, columns, device=device)
    path = slerp(noise[:rows, None], noise[rows:, None], share[:, None]).flatten(0, 1)
    if given is not None:
        given = torch.lerp(given[:rows, None], given[rows:, None], share[:, None]).flatten(0, 1)
    return figures.image_grid(out / "interpolations.png", decode(flow, path, given).numpy(), columns)


def draw_classes(flow: Flow, names: tuple[str, ...], temperature: float, seed: int, out: Path) -> Path:
    """One row a class, one noise a column."""
    columns = 12
    noise = base_noise(columns, temperature, seed).repeat(CLASSES, 1)
    context = class_context(torch.arange(CLASSES).repeat_interleave(columns))
    return figures.image_grid(out / "classes.png", decode(flow, noise, context).numpy(), columns, names)


def draw_neighbours(made: Tensor, images: Images, out: Path, columns: int = 10, nearest: int = 3) -> Path:
    """Samples above their nearest training images in pixel space, and how near these are to samples and test images.

    Samples that lie much nearer to the training images than test images do would be copies.
    """
    test = images.test[: len(made)].flatten(1) / LEVELS
    distances, indices = nearest_images(made.flatten(1), images.train.flatten(1), nearest)
    beside, _ = nearest_images(test, images.train.flatten(1), 1)
    columns = min(columns, len(made))
    rows = [made[:columns], *(images.train[indices[:columns, i]] / LEVELS for i in range(indices.shape[1]))]
    labels = ["samples", "nearest", "2nd", "3rd"]
    title = (
        "mean distance to the nearest training image: "
        f"{distances[:, 0].mean():.1f} from a sample, {beside.mean():.1f} from a test image"
    )
    return figures.image_grid(
        out / "neighbours.png", torch.cat(rows).numpy(), columns, labels[: len(rows)], title
    )  # fmt: skip


def nearest_images(queries: Tensor, train: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances to, and indices of, the nearest of ``train`` (bytes), ``(n, count)`` each, nearest first."""
    distances = torch.cat([torch.cdist(queries, part / LEVELS) for part in train.split(10_000)], dim=1)
    return distances.topk(min(count, len(train)), dim=1, largest=False)


def check_load(arguments: dict[str, Any]) -> None:
    """Raise a ValueError for arguments beside ``load`` that a run without training would ignore."""
    parameters = inspect.signature(main).parameters
    ignored = [
        f"--{name.replace('_', '-')}"
        for name, value in arguments.items()
        if name not in ("load", "out", "samples", "temperature", "seed", "device") and value != parameters[name].default
    ]
    if ignored:
        raise ValueError(f"--load trains nothing, so {', '.join(ignored)} would be ignored: leave it out")


def draw_again(
    load: Path, out: Path | None, samples: int, temperature: float, seed: int, device: str
) -> dict[str, float]:
    """Samples of a saved run, and its classes if it has any: ``--load``."""
    load = newest_run(load, FILE)
    flow = load_flow(load)
    if flow.event_shape != (math.prod(SHAPE),) or flow.context_features not in (None, CLASSES):
        raise ValueError(
            f"the flow in {load} is not one of runs/mnist.py: its data have shape {tuple(flow.event_shape)}"
        )
    out = open_directory(out or load)
    flow = flow.to(make_accelerator(device).device)
    pictures = [draw_samples(decode(flow, base_noise(samples, temperature, seed), in_turn(flow, samples)), out)]
    if flow.context_features is not None:
        pictures.append(draw_classes(flow, tuple(map(str, range(CLASSES))), temperature, seed, out))
    print(f"{samples} samples of {load}" + "".join(f"\n  {path}" for path in pictures))
    return {}


if __name__ == "__main__":
    cli(main)
