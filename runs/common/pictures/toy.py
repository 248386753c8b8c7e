"""The pictures of runs/toy.py: what was to be learned beside what was learned, and how the training went."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.flow import Flow
from runs.common.densities import Density
from runs.common.pictures import figures
from runs.common.pictures.record import Record
from runs.common.scores import on_grid


@dataclass
class ToyRecord(Record):
    """What a toy run's pictures show.

    Attributes:
        entropy: of the true density, in nats: the least NLL that there can be.
        losses: pairs (step, mean NLL since the last pair).
        true_density, learned_density: their values on a grid over (0, 1)², as ``scores.on_grid`` gives them.
        true_samples, learned_samples: points, ``(n, 2)`` each.
        frames: the learned density on a grid at moments of the training, ``(frames, n, n)``; empty for no film.
    """

    entropy: float
    losses: list[tuple[int, float]]
    true_density: Tensor
    learned_density: Tensor
    true_samples: Tensor
    learned_samples: Tensor
    frames: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, flow: Flow, true: Density, losses: list[tuple[int, float]], frames: list[Tensor]) -> "ToyRecord":
        """What is to be shown of a training that has ended."""
        return cls(
            entropy=true.entropy,
            losses=losses,
            true_density=on_grid(true),
            learned_density=on_grid(flow),
            true_samples=true.sample(6000).cpu(),
            learned_samples=flow.sample(6000).cpu(),
            frames=torch.stack(frames) if frames else torch.empty(0),
        )

    def draw(self, out: Path) -> list[Path]:
        pictures = [self.draw_densities(out / "densities.png"), self.draw_training(out / "training.png")]
        if len(self.frames):
            pictures.append(figures.save_animation(out / "forming.gif", list(self.frames.numpy()), self.top))
        return pictures

    @property
    def top(self) -> float:
        """Where the colour scale ends, of all densities alike."""
        return figures.HEADROOM * self.true_density.max().item()

    def draw_densities(self, path: Path) -> Path:
        """True and learned density, and samples of both below them."""
        with figures.figure(path, 2, 2, size=(6.6, 6)) as (drawing, axes):
            figures.density(axes[0, 0], self.true_density.numpy(), self.top, "true density")
            image = figures.density(axes[0, 1], self.learned_density.numpy(), self.top, "learned density")
            figures.density_scale(drawing, image, axes[0], above=self.learned_density.max().item() > self.top)
            figures.scatter(axes[1, 0], self.true_samples.numpy(), "samples of the true density")
            figures.scatter(axes[1, 1], self.learned_samples.numpy(), "samples of the flow")
        return path

    def draw_training(self, path: Path) -> Path:
        """The NLL, and the entropy below which it can't fall."""
        steps, losses = zip(*self.losses, strict=True) if self.losses else ((0,), (self.entropy,))
        with figures.figure(path, size=(6, 3)) as (_, axes):
            figures.curve(axes, steps, losses, smooth=min(9, 1 + len(losses) // 3), label="training NLL")
            axes.axhline(self.entropy, color=figures.ACCENT, linewidth=1, linestyle="--", label="entropy: the floor")
            lowest, highest = np.quantile(losses, [0, 0.98])
            margin = 0.1 * (highest - self.entropy)
            figures.steps_axis(axes)
            axes.set(ylabel="NLL (nats)", ylim=(min(lowest, self.entropy) - margin, highest + margin))
            axes.legend()
        return path


class Camera:
    """Watches the learned density form: ``count`` frames through the training, early ones closer together."""

    def __init__(self, flow: Flow, steps: int, count: int = 60):
        self.flow = flow
        self.when = {round((i / count) ** 2 * steps) for i in range(count)}
        self.frames: list[Tensor] = []

    def __call__(self, step: int) -> None:
        """To be called before each step of the training."""
        if step in self.when:
            self.take()

    def take(self) -> None:
        """One frame, now."""
        training = self.flow.training
        self.frames.append(on_grid(self.flow.eval(), 150))
        self.flow.train(training)
