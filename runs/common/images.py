"""Image data sets, whole in memory as bytes, and the exercise's dequantisation.

MNIST comes with the project (``runs/data/mnist``); its cousins come through torchvision.
"""

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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
HIGH = 256 / 255  # x / 255 + U(0, 1) / 255 ends here, not at 1
LEVELS = 255  # bins of width 1/255


@dataclass(frozen=True)
class Images:
    """A data set: images as bytes ``(n, height, width)`` and labels ``(n,)``, in a fixed split.

    The last 5,000 of a fixed shuffle of the training files are the validation data.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor


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
    except Exception as error:  # torchvision raises RuntimeError, URLError, ValueError, EOFError, … for the same causes
        raise OSError(
            f"{dataset} could not be read from, or downloaded to, {data_dir} ({error}). Check the connection, or put "
            f"its files under {data_dir / dataset / 'raw'} and choose that directory with --data-dir; if a file there "
            "is damaged, delete it"
        ) from error
    order = torch.randperm(len(train.data), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:-VALIDATION], order[-VALIDATION:]
    labels, test_labels = (data.targets if data.targets.dim() == 1 else data.targets[:, 0] for data in (train, test))
    return Images(
        train.data[kept], labels[kept], train.data[held_out], labels[held_out], test.data, test_labels
    )  # fmt: skip


def unpack_mnist(raw: Path, embedded: Path = EMBEDDED) -> None:
    """Put MNIST's four files where torchvision looks for them, verified, each whole or not at all."""
    raw.mkdir(parents=True, exist_ok=True)
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
        unfinished = target.with_name(f".{name}.unfinished-{os.getpid()}")
        unfinished.write_bytes(content)
        os.replace(unfinished, target)


def dequantize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x/255 + U(0, 1)/255, flattened, on the images' device: bytes ``(n, …)`` → ``(n, D)`` in [0, 256/255)."""
    pixels = images.flatten(1).to(dtype)
    return (pixels + torch.rand_like(pixels)) / LEVELS


def bits_per_dim(nll: float, dimensions: int) -> float:
    """NLL in nats of dequantised images as bits per pixel: NLL / (D ln 2) + log₂ 255, since the bins are 1/255 wide."""
    return nll / (dimensions * math.log(2)) + math.log2(LEVELS)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _torchvision_datasets():
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ImportError("image data needs torchvision: pip install 'flow-adapters[mnist]'") from error
    except RuntimeError as error:  # "operator torchvision::nms does not exist": its build does not fit torch's
        raise ImportError(
            f"the installed torchvision does not fit torch {torch.__version__} ({error}); install both from the same "
            "place in one command: pip install --force-reinstall torch torchvision"
        ) from error
    return datasets
