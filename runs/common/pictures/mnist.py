"""The pictures of runs/mnist.py: samples, how they came about, and what lies between and beside them."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapters import load_flow
from adapters.checkpoint import FILE as WEIGHTS
from adapters.flow import Flow
from runs.common.devices import device_of, make_accelerator
from runs.common.images import CLASSES, LEVELS, SHAPE, Images, context_for, dequantize
from runs.common.options import RunOptions
from runs.common.pictures import figures
from runs.common.pictures.record import Record
from runs.common.results import RECORD, newest_run, open_directory
from runs.common.samples import Sampling, base_noise, decode, in_turn, slerp
from runs.common.scores import EVALUATION_SEED
from runs.common.training_state import Fitted

AGAIN = "again"  # the directory, within a run's own, of pictures that differ from the run's
SAMPLES = 100  # images in the sample grid, unless a run says otherwise
COLUMNS = 10  # images in a row
CLASS_COLUMNS = 12  # likewise, where each class has a row
NEAREST = 3  # training images shown below each sample

# Published bits per dimension on the test set, to compare with.
PUBLISHED = {"MNIST": {"Real NVP, fully connected": 1.93, "MAF MoG": 1.52, "Glow, convolutional": 1.05}}


@dataclass
class SampleRecord(Record):
    """Samples of a flow. All images here are ``(n, 28, 28)`` with values in [0, 1].

    Attributes:
        temperature, seed: of the noise that the samples are made from.
        samples: as many as were asked for; the classes of a conditional flow follow each other.
        classes: for each class a row of images, a column from the same noise; ``None`` for an unconditional flow.
        names: of the classes.
    """

    temperature: float
    seed: int
    samples: Tensor
    classes: Tensor | None
    names: tuple[str, ...]

    def draw(self, out: Path) -> list[Path]:
        columns = math.ceil(math.sqrt(len(self.samples)))  # as square as it gets
        pictures = [figures.image_grid(out / "samples.png", self.samples.numpy(), columns)]
        if self.classes is not None:
            columns = len(self.classes) // len(self.names)
            pictures.append(figures.image_grid(out / "classes.png", self.classes.numpy(), columns, self.names))
        return pictures

    @property
    def sampling(self) -> Sampling:
        """What was asked for."""
        return Sampling(len(self.samples), self.temperature, self.seed)


def sampled(flow: Flow, names: tuple[str, ...], sampling: Sampling) -> SampleRecord:
    """New samples of a flow, and of a conditional one also the same noise in every class."""
    count, temperature, seed = sampling
    classes = None
    if flow.context_features is not None:
        noise = base_noise(CLASS_COLUMNS, temperature, seed).repeat(CLASSES, 1)
        classes = decode(flow, noise, context_for(flow, torch.arange(CLASSES).repeat_interleave(CLASS_COLUMNS)))
    samples = decode(flow, base_noise(count, temperature, seed), in_turn(flow, count))
    return SampleRecord(temperature, seed, samples, classes, names)


class Camera:
    """Watches the same noise become images, ever less often; it stops if an image takes too long to make."""

    def __init__(self, flow: Flow, sampling: Sampling, patience: float = 1.0):
        self.flow = flow
        self.sampling = sampling
        self.noise = base_noise(COLUMNS, sampling.temperature, sampling.seed)
        self.context = in_turn(flow, COLUMNS)
        self.patience = patience
        self.frames: dict[int, Tensor] = {}
        self.next = 10

    def __call__(self, step: int) -> None:
        """To be called before each step of the training."""
        if step >= self.next:
            started = time.monotonic()
            self.take(step)
            too_slow = time.monotonic() - started > self.patience  # an autoregressive flow: one pass for each pixel
            self.next = math.inf if too_slow else 2 * step

    def take(self, step: int) -> None:
        """One frame, now."""
        training = self.flow.training
        self.frames[step] = decode(self.flow.eval(), self.noise, self.context)
        self.flow.train(training)


@dataclass
class MnistRecord(SampleRecord):
    """What the pictures of a training show.

    Attributes:
        dataset: name of the data set.
        losses, validation: pairs (step, bits per dimension).
        frames: what the same noise became after so many steps.
        interpolations: rows of images from one test image to another.
        neighbours: some samples, and below them rows of the training images that are nearest to them,
            ``(rows, columns, 28, 28)``.
        from_samples, from_test: mean distance to the nearest training image.
    """

    dataset: str
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    frames: dict[int, Tensor]
    interpolations: Tensor
    neighbours: Tensor
    from_samples: float
    from_test: float

    @classmethod
    def of(cls, images: Images, dataset: str, fitted: Fitted, camera: Camera) -> "MnistRecord":
        """What is to be shown of a training that has ended, and that the camera has watched."""
        flow = camera.flow
        camera.take(fitted.steps)
        samples = sampled(flow, images.classes, camera.sampling)
        neighbours, from_samples, from_test = neighbours_of(samples.samples, images)
        return cls(
            **vars(samples),
            dataset=dataset,
            losses=fitted.losses,
            validation=fitted.validation,
            frames=camera.frames,
            interpolations=interpolations(flow, images, rows=min(8, max(1, len(samples.samples) // COLUMNS))),
            neighbours=neighbours,
            from_samples=from_samples,
            from_test=from_test,
        )

    def draw(self, out: Path) -> list[Path]:
        pictures = [
            *super().draw(out),
            self.draw_training(out / "training.png"),
            self.draw_progress(out / "progress.png"),
            self.draw_neighbours(out / "neighbours.png"),
        ]
        if len(self.interpolations):  # they need two test images
            pictures.append(figures.image_grid(out / "interpolations.png", self.interpolations.numpy(), COLUMNS))
        return pictures

    def draw_training(self, path: Path) -> Path:
        """Training and validation, beside those of the published figures that lie in sight."""
        with figures.figure(path, size=(6, 3.2)) as (_, axes):
            steps, values = zip(*self.losses, strict=True) if self.losses else ((), ())
            figures.curve(axes, steps, values, smooth=9, label="training")
            axes.plot(
                *zip(*self.validation, strict=True), "o-", color=figures.ACCENT, markersize=3, linewidth=1,
                label="validation",
            )  # fmt: skip
            every = torch.tensor([*values, *(value for _, value in self.validation)])
            low, high = every.min().item(), torch.quantile(every, 0.95).item()
            margin = 0.15 * (high - low) + 0.02
            figures.steps_axis(axes)
            axes.set(ylabel="bits/dim", ylim=(low - margin, high + margin))
            for name, value in PUBLISHED.get(self.dataset, {}).items():
                if low - margin < value < high + margin:
                    figures.reference(axes, value, name)
            axes.legend()
        return path

    def draw_progress(self, path: Path, rows: int = 8) -> Path:
        """The same noise at several moments, a row each."""
        steps = sorted(self.frames)
        chosen = sorted({steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)})
        frames = torch.cat([self.frames[step] for step in chosen]).numpy()
        return figures.image_grid(path, frames, COLUMNS, [f"step {step:,}" for step in chosen])

    def draw_neighbours(self, path: Path) -> Path:
        """Samples that lie much nearer to the training images than test images do would be copies."""
        rows, columns = self.neighbours.shape[:2]
        labels = ["samples", "nearest", "2nd", "3rd"][:rows]
        title = (
            "mean distance to the nearest training image: "
            f"{self.from_samples:.1f} from a sample, {self.from_test:.1f} from a test image"
        )
        return figures.image_grid(path, self.neighbours.flatten(0, 1).numpy(), columns, labels, title)


@torch.no_grad()
def interpolations(flow: Flow, images: Images, rows: int) -> Tensor:
    """From one test image to another along the sphere between their noises; a class slides along with them."""
    test, device = images.test, device_of(flow)
    rows = min(rows, len(test) // 2)
    x = dequantize(test[: 2 * rows].to(device), torch.Generator(device).manual_seed(EVALUATION_SEED))
    context = context_for(flow, images.test_labels[: 2 * rows])
    context = None if context is None else context.to(device)
    noise = flow.encode(x, context)
    share = torch.linspace(0, 1, COLUMNS, device=device)
    path = slerp(noise[:rows, None], noise[rows:, None], share[:, None]).flatten(0, 1)
    if context is not None:
        context = torch.lerp(context[:rows, None], context[rows:, None], share[:, None]).flatten(0, 1)
    return decode(flow, path, context)


def neighbours_of(samples: Tensor, images: Images) -> tuple[Tensor, float, float]:
    """Samples above their nearest training images in pixel space, a row for each rank of nearness.

    Returns:
        the images, and the mean distances to the nearest training image from a sample and from a test image.
    """
    train, test = images.train.flatten(1), images.test[: len(samples)].flatten(1) / LEVELS
    distances, indices = nearest_images(samples.flatten(1), train, NEAREST)
    beside, _ = nearest_images(test, train, 1)
    nearest = images.train[indices[:COLUMNS].T] / LEVELS  # (ranks, samples, 28, 28)
    return torch.cat((samples[None, :COLUMNS], nearest)), distances[:, 0].mean().item(), beside.mean().item()


def nearest_images(queries: Tensor, train: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances to, and indices of, the nearest of ``train`` (bytes), ``(n, count)`` each, nearest first."""
    distances = torch.cat([torch.cdist(queries, part / LEVELS) for part in train.split(10_000)], dim=1)
    return distances.topk(min(count, len(train)), dim=1, largest=False)


def draw_again(run: RunOptions, count: int | None, temperature: float, seed: int, maker: str | None = None) -> None:
    """Draw the pictures of the run in ``--load``, or of the newest run right below it, without training.

    If the samples that are asked for are those that the run itself has drawn, these are its own pictures, and they take
    their own places. Otherwise its flow makes new samples, and all pictures go to the directory ``again`` within the
    run's, so that none of its own is overwritten. ``--out`` names any other directory.

    A training that was cut short by a loss that is not finite leaves a flow and nothing else to draw: then there are
    samples alone.

    Args:
        run: says where the run is, and where the pictures go.
        count: how many samples; ``None`` for as many as the run's own.
        temperature, seed: of their noise.
        maker: the name of the user's own flow, which new samples take.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it is damaged, or another script's.
    """
    assert run.load is not None
    directory = newest_run(run.load, WEIGHTS)
    own = MnistRecord.load(directory) if (directory / RECORD).is_file() else None
    sampling = Sampling(count or (SAMPLES if own is None else len(own.samples)), temperature, seed)
    if own is not None and own.sampling == sampling:
        record, out = own, directory
    else:
        flow = load_flow(directory, maker)
        assert isinstance(flow, Flow)  # whatever build_flow makes is one
        if flow.event_shape != (math.prod(SHAPE),) or flow.context_features not in (None, CLASSES):
            raise ValueError(
                f"the flow in {directory} is not one of runs/mnist.py: its data have shape {tuple(flow.event_shape)}"
            )
        names = tuple(map(str, range(CLASSES))) if own is None else own.names
        new = sampled(flow.to(make_accelerator(run.device).device), names, sampling)
        record, out = new if own is None else replace(own, **vars(new)), directory / AGAIN
    pictures = record.draw(open_directory(run.out or out))
    print("\n".join([f"{sampling.samples} samples of {directory}", *(f"  {path}" for path in pictures)]))
    if own is not None and own.sampling != sampling:
        flags = " ".join(f"--{name} {value}" for name, value in own.sampling._asdict().items())
        print(f"the run's own samples are those of {flags}")
