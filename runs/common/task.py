"""What a task is, on which flows are compared: ``runs.common.tasks`` lists them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from adapters.flow import Flow
from adapters.masks import checkerboard_mask


class Trial(NamedTuple):
    """One flow's training, ready to start.

    Attributes:
        loss: a module; ``loss(batch(i))`` is what is minimised, in the task's measure or what its ``loss`` says.
        batch: ``batch(i)`` is the i-th batch.
        score: the measure on test data, and its standard error.
        picture: an image of what was learned.
    """

    loss: nn.Module
    batch: Callable[[int], Any]
    score: Callable[[], tuple[float, float]]
    picture: Callable[[], np.ndarray]


class Task(ABC):
    """A task.

    Attributes:
        measure: what the score is, and ``unit`` in what; lower is better, unless ``higher_is_better``.
        loss: what the curves of training show, and in what; ``None`` if they show the measure, in its unit.
        features, layers, hidden, batch_size, masks, preprocess: what every flow is built with.
        recipe: what every flow is trained with, beside the budget.
        context_features: width of the context that every flow is conditioned on; ``None`` for none.
        box: where a density in the plane lies, for ∫p; ``None`` if there is none.
        device: where data and flows are.
    """

    measure: ClassVar[str]
    unit: ClassVar[str] = "nats"
    higher_is_better: ClassVar[bool] = False
    loss: ClassVar[str | None] = None
    features: ClassVar[int]
    layers: ClassVar[int]
    hidden: ClassVar[tuple[int, ...]]
    batch_size: ClassVar[int]
    recipe: ClassVar[dict[str, Any]]
    context_features: ClassVar[int | None] = None
    box: ClassVar[tuple[float, float] | None] = None
    device: torch.device

    @property
    def masks(self) -> list[Tensor]:
        mask = checkerboard_mask(self.features)
        return [mask, 1 - mask]

    @property
    def preprocess(self) -> Transform | None:
        return None

    @classmethod
    def true_picture(cls) -> np.ndarray | None:
        """What a perfect flow's picture would show; ``None`` where nobody knows."""
        return None

    @abstractmethod
    def vectors(self, n: int) -> Tensor:
        """Data as the flow sees them, for gates and timing, ``(n, D)``."""

    @abstractmethod
    def trial(self, flow: Flow, seed: int) -> Trial:
        """That flow's training with that seed, from its start."""

    def alone(self, flow: Flow) -> Flow:
        """The flow as gates and timing call it, without a context."""
        return flow
