"""What flows are compared on: each task has its data, its loss, its score, and a picture of what was learned."""

import math
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from nflows.transforms import Transform
from torch import Tensor

from adapters.flow import Flow
from adapters.masks import checkerboard_mask
from adapters.preprocess import Marginals
from adapters.priors import FlowPrior
from adapters.vae import VAE, Decoder, Encoder
from runs.common.densities import DENSITIES
from runs.common.devices import seeded
from runs.common.images import SHAPE, Batches, bits_per_dim, dequantize, load_images, mosaic, threshold
from runs.common.npe import LinearGaussian, TwoMoons
from runs.common.objectives import BitsPerDim, NegativeELBO, NegativeLogLikelihood
from runs.common.samples import base_noise, decode, decoded_samples
from runs.common.scores import (
    EVALUATION_SEED,
    TEST_POINTS,
    divergence,
    elbo_terms,
    log_likelihoods,
    on_grid,
    standard_error,
)
from runs.common.task import Task, Trial

SPLINES = {"bins": 8, "tail_bound": 4.0}  # of every flow that has them
GRID = 150


class PlaneTask(Task):
    """KL(true ‖ flow) on one of the exercise's densities, fresh points in every step.

    All flows are scored on the same points: what these have by chance is then not taken for a difference of two flows.
    """

    measure, features, layers, hidden, batch_size = "KL", 2, 8, (64, 64), 1024
    recipe: ClassVar = {"lr": 3e-3, "betas": (0.9, 0.99), "average": 0.999}
    data: ClassVar[str]

    def __init__(self, device: torch.device, test_points: int = TEST_POINTS):
        self.device, self.true = device, DENSITIES[self.data](device)
        with seeded(EVALUATION_SEED, device):
            self.test = self.true.sample(test_points)

    @property
    def preprocess(self) -> Transform | None:
        return self.true.preprocess()

    @classmethod
    def true_picture(cls) -> np.ndarray | None:
        return on_grid(DENSITIES[cls.data](), GRID).numpy()

    def vectors(self, n: int) -> Tensor:
        return self.true.sample(n)

    def trial(self, flow: Flow, seed: int) -> Trial:
        loss = NegativeLogLikelihood(flow)
        loss.register_forward_hook(lambda module, args, value: value - self.true.entropy)  # the KL, on this batch
        return Trial(
            loss,
            lambda step: self.true.sample(self.batch_size),
            lambda: divergence(self.true, flow.log_prob, self.test),
            lambda: on_grid(flow, GRID).numpy(),
        )


class TwoGaussians(PlaneTask):
    data, box = "two-gaussians", (-0.5, 1.5)


class Chequerboard(PlaneTask):
    data, box = "chequerboard", (0.0, 1.0)


class ImageTask(Task):
    """A task on MNIST.

    Args:
        device: where the flows are.
        data_dir: where MNIST is unpacked; by default the user's cache.
        limit: use only so many images of each split.
    """

    def __init__(self, device: torch.device, data_dir: Path | None = None, limit: int | None = None):
        self.device = device
        self.images = load_images("MNIST", data_dir).first(limit)


class Mnist(ImageTask):
    """Bits per dimension on MNIST, each pixel's histogram as preprocessing, chequerboard masks."""

    measure, unit, layers, hidden, batch_size = "NLL", "bits/dim", 8, (256, 256), 128
    features = math.prod(SHAPE)
    recipe: ClassVar = {"lr": 1e-3, "average": 0.999}

    @property
    def masks(self) -> list[Tensor]:
        mask = checkerboard_mask(*SHAPE).flatten()
        return [mask, 1 - mask]

    @property
    def preprocess(self) -> Transform | None:
        return self._marginals

    @cached_property
    def _marginals(self) -> Marginals:
        return Marginals.of(self.images.train.flatten(1))

    def vectors(self, n: int) -> Tensor:
        return dequantize(self.images.validation[:n].to(self.device))

    def trial(self, flow: Flow, seed: int) -> Trial:
        def score() -> tuple[float, float]:
            log_p = log_likelihoods(flow, self.images.test, None).cpu().double()
            value = bits_per_dim(-log_p.mean().item(), self.features)
            return value, standard_error(log_p, self.features)

        def picture() -> np.ndarray:
            return mosaic(decode(flow, base_noise(16, 1.0, seed), None).numpy(), 4)

        batches = Batches(self.images.train, None, self.batch_size, seed, self.device)
        return Trial(BitsPerDim(flow), batches, score, picture)


class VaePrior(ImageTask):
    """The ELBO of the course's VAE under that flow as prior, pixels > 0.5."""

    measure, higher_is_better, features, layers, hidden, batch_size = "ELBO", True, 32, 8, (128, 128), 128
    recipe: ClassVar = {"lr": 1e-3, "warmup": 0.05, "decay": 0.3, "average": 0.999, "clip": None}

    def vectors(self, n: int) -> Tensor:
        return torch.randn(n, self.features, device=self.device)

    def trial(self, flow: Flow, seed: int) -> Trial:
        vae = VAE(FlowPrior(flow), Encoder(self.features), Decoder(self.features)).to(self.device)

        def score() -> tuple[float, float]:
            reconstruction, kl = elbo_terms(vae, threshold(self.images.test))
            elbo = reconstruction - kl
            return elbo.mean().item(), elbo.std().item() / math.sqrt(len(elbo))

        def picture() -> np.ndarray:
            return mosaic(decoded_samples(vae, seed, 16).numpy(), 4)

        batches = Batches(self.images.train, None, self.batch_size, seed, self.device, prepare=threshold)
        return Trial(NegativeELBO(vae), batches, score, picture)


TASKS: dict[str, type[Task]] = {
    "two-gaussians": TwoGaussians,
    "chequerboard": Chequerboard,
    "mnist": Mnist,
    "vae-prior": VaePrior,
    "npe": TwoMoons,
    "npe-gaussian": LinearGaussian,
}
DENSITY_TASKS = [name for name, task in TASKS.items() if task.context_features is None]  # none of them needs sbi
IMAGE_TASKS = [name for name, task in TASKS.items() if issubclass(task, ImageTask)]


def make_task(
    name: str,
    device: torch.device,
    test_points: int = TEST_POINTS,
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Task:
    """The task of that name, with its data.

    Args:
        name: one of ``TASKS``.
        device: where data and flows are.
        test_points: fresh points that a density in the plane is scored on.
        data_dir, limit: see ``ImageTask``.
    """
    kind = TASKS[name]
    if issubclass(kind, ImageTask):
        return kind(device, data_dir, limit)
    return kind(device, test_points)  # type: ignore[call-arg]  # all others take these
