"""Image data sets, whole in memory as bytes, and the exercise's dequantisation.

MNIST comes with the project (``runs/data/mnist``); its cousins come through torchvision.
"""

import gzip
import hashlib
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from adapters.checkpoint import write_atomically

EMBEDDED = Path(__file__).parent.parent / "data" / "mnist"
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
DATASETS = ("MNIST", "FashionMNIST", "KMNIST", "QMNIST")
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flow-adapters"
VALIDATION = 5_000
CLASSES = 10  # in each of them
SHAPE = (28, 28)
HIGH = 256 / 255  # x / 255 + U(0, 1) / 255 ends here, not at 1
LEVELS = 255  # bins of width 1/255
Nats = TypeVar("Nats", float, Tensor)


@dataclass(frozen=True)
class Images:
    """A data set: images as bytes ``(n, height, width)`` and labels ``(n,)``, in a fixed split.

    The last 5,000 of a fixed shuffle of the training files are the validation data. ``classes`` are the labels' names.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def first(self, n: int | None) -> "Images":
        """At most ``n`` images of each split; ``None`` for all."""
        return Images(*(part[:n] for part in list(vars(self).values())[:-1]), self.classes)


def load_images(dataset: str = "MNIST", data_dir: Path | None = None) -> Images:
    """Read a data set, downloading what is neither embedded nor there yet.

    Args:
        dataset: one of ``DATASETS``.
        data_dir: where torchvision keeps its data sets; by default the user's cache.

    Raises:
        ValueError: for a data set that is not known.
        ImportError: if torchvision is missing, or does not fit the installed torch.
        OSError: if files are missing, corrupt or cannot be downloaded.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}")
    datasets = _torchvision_datasets()
    data_dir = Path(data_dir) if data_dir is not None else DATA_DIR
    if dataset == "MNIST":
        unpack_mnist(data_dir / "MNIST" / "raw")
    try:
        train, test = (
            getattr(datasets, dataset)(data_dir, train=train, download=dataset != "MNIST") for train in (True, False)
        )
        for split in (train, test):
            _check_split(split)
    except Exception as error:  # torchvision raises RuntimeError, URLError, ValueError, EOFError, … for the same causes
        raise OSError(
            f"{dataset} could not be read from, or downloaded to, {data_dir} ({error or type(error).__name__}). Check "
            f"the connection, or put its files under {data_dir / dataset / 'raw'} and choose that directory with "
            "--data-dir; if a file there is damaged, delete it"
        ) from error
    order = torch.randperm(len(train.data), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:-VALIDATION], order[-VALIDATION:]
    labels, test_labels = (
        split.targets if split.targets.dim() == 1 else split.targets[:, 0] for split in (train, test)
    )
    return Images(
        train=train.data[kept],
        train_labels=labels[kept],
        validation=train.data[held_out],
        validation_labels=labels[held_out],
        test=test.data,
        test_labels=test_labels,
        classes=tuple(name.split(" - ")[0] for name in train.classes),
    )


def unpack_mnist(raw: Path, embedded: Path = EMBEDDED) -> None:
    """Put MNIST's four files where torchvision looks for them, verified, each whole or not at all."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--data-dir: {raw} can't be made ({error.strerror}); choose another directory") from error
    for name, md5 in MD5.items():
        target = raw / name
        if target.is_file() and _md5(target.read_bytes()) == md5:
            continue
        packed = embedded / f"{name}.gz"
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise OSError(f"{packed} is missing or damaged ({error}); restore it, e.g. with git checkout") from error
        if _md5(content) != md5:
            raise OSError(f"{packed} has the MD5 sum {_md5(content)}, not {md5}; restore it, e.g. with git checkout")
        try:
            write_atomically(target, lambda path, content=content: path.write_bytes(content))
        except OSError as error:
            raise OSError(f"--data-dir: {error}; choose another") from error


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x/255 + U(0, 1)/255, flattened, on the images' device: bytes ``(n, …)`` → floats ``(n, D)`` in [0, 256/255]."""
    pixels = images.flatten(1)
    noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
    return noise.add_(pixels).div_(LEVELS)


def threshold(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 where x/255 > 0.5, else 0, flattened: bytes ``(n, …)`` → floats ``(n, D)``."""
    return (images.flatten(1) > LEVELS / 2).float()


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability x/255, else 0, drawn anew in each call, flattened: bytes ``(n, …)`` → floats ``(n, D)``."""
    pixels = images.flatten(1)
    return (torch.rand(pixels.shape, generator=generator, device=pixels.device) < pixels / LEVELS).float()


def warped(images: Tensor, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """Each image turned, stretched, sheared and shifted by draws of its own: ``(n, N, N)`` → floats ``(n, N, N)``.

    Uniform draws, for an amount of 1, of ±6 degrees, ±6 %, ±0.06 and ±1 pixel along either axis, bilinear, zeros moving
    in; an amount of 0 leaves the images as they are.
    """
    n, size = len(images), images.shape[1]
    turn, stretch, shear, right, down = amount * (2 * torch.rand(5, n, generator=generator, device=images.device) - 1)
    angle, scale, shear = math.radians(6) * turn, torch.exp(0.06 * stretch), 0.06 * shear
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (cos, shear * cos - sin, 2 / size * right), (sin, shear * sin + cos, 2 / size * down)
    places = affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), [n, 1, size, size], align_corners=False)
    return grid_sample(images[:, None].float(), places, align_corners=False)[:, 0]


class Batches:
    """Shuffled, freshly prepared batches without end; an epoch's last images, too few for a batch, are left out.

    The i-th batch depends on i and the seed alone, not on what was drawn before: a resumed training sees what an
    uninterrupted one would have seen, and several processes share one batch. The images stay on the device as bytes.

    Args:
        images: bytes ``(n, height, width)``.
        context: ``(n, C)``, or ``None``.
        size: images in a batch, all processes together.
        seed: of the order and the noise.
        device: where the batches are wanted.
        share: (k, P): give the k-th of P equal parts of each batch.
        prepare: ``prepare(images, generator)`` makes floats ``(n, D)`` of them; by default it dequantises.
        augment: ``augment(images, epoch, generator)`` changes them before that, e.g. less in later epochs: ``epoch`` is
            how many have passed, 1.5 in the middle of the second one. ``None`` for no change.

    Raises:
        ValueError: if there are fewer images than a batch needs, or the processes can't share a batch evenly.
    """

    def __init__(
        self,
        images: Tensor,
        context: Tensor | None,
        size: int,
        seed: int,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
        prepare: Callable[[Tensor, torch.Generator], Tensor] = dequantize,
        augment: Callable[[Tensor, float, torch.Generator], Tensor] | None = None,
    ):
        part, parts = share
        if len(images) < size:
            raise ValueError(f"batch_size {size} is more than the {len(images)} training images")
        if size % parts:
            raise ValueError(f"batch_size {size} can't be shared evenly by {parts} processes")
        self.images = images.to(device)
        self.context = None if context is None else context.to(device)
        self.size = size
        self.per_epoch = len(images) // size
        self.seed = seed
        self.prepare = prepare
        self.augment = augment
        self.rows = slice(part * size // parts, (part + 1) * size // parts)
        self.seconds = 0.0  # spent here so far
        self.served = 0
        self._generator = torch.Generator(device)
        self._epoch, self._order = -1, None

    def __call__(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The i-th batch: ``(size / P, D)``, in [0, 256/255] if dequantised, and its context."""
        started = time.perf_counter()
        epoch, position = divmod(i, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, 0, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self._epoch, self._order = epoch, order.to(self.images.device)
        chosen = self._order[position * self.size : (position + 1) * self.size]
        self._generator.manual_seed(_mix(self.seed, 1, i))
        images = self.images.index_select(0, chosen)
        if self.augment is not None:
            images = self.augment(images, i / self.per_epoch, self._generator)
        x = self.prepare(images, self._generator)[self.rows]
        context = None if self.context is None else self.context.index_select(0, chosen[self.rows])
        self.seconds += time.perf_counter() - started
        self.served += 1
        return x, context


def class_context(labels: Tensor) -> Tensor:
    """Labels ``(n,)`` as one-hot rows ``(n, 10)``: the context of a class-conditional flow."""
    return one_hot(labels.long(), CLASSES).float()


def bits_per_dim(nll: Nats, dimensions: int) -> Nats:
    """NLL in nats of dequantised images as bits per pixel: NLL / (D ln 2) + log₂ 255, since the bins are 1/255 wide."""
    return nll / (dimensions * math.log(2)) + math.log2(LEVELS)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images ``(n, height, width)`` side by side as one, row by row; those that fill no row are left out."""
    rows = len(images) // columns
    return images.reshape(rows, columns, *SHAPE).swapaxes(1, 2).reshape(rows * SHAPE[0], columns * SHAPE[1])


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _mix(*numbers: int) -> int:
    """One well-mixed seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _check_split(split) -> None:
    """Raise a ValueError unless there are as many labels as images, all in range."""
    images, labels = split.data, split.targets if split.targets.dim() == 1 else split.targets[:, 0]
    if images.dtype != torch.uint8 or images.shape[1:] != SHAPE or len(images) != len(labels):
        raise ValueError(
            f"{len(labels)} labels for {images.dtype} images of shape {tuple(images.shape)}, "
            "where bytes of shape (n, 28, 28) are wanted"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels outside 0 to {CLASSES - 1}, or none at all")


def _torchvision_datasets():
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ImportError("image data needs torchvision: pip install 'flow-adapters[mnist]'") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # e.g. "torchvision::nms does not exist"
        raise ImportError(
            f"the installed torchvision does not fit torch {torch.__version__} ({error}); install both from the same "
            "place in one command: pip install --force-reinstall torch torchvision"
        ) from error
    return datasets
