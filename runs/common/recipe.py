"""How to train: every number of a training loop that is not the model's or the data's."""

import math
from dataclasses import dataclass
from typing import Any

from adapters.checks import check_positive
from runs.common.devices import PRECISIONS


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup: share of the training over which the rate rises from 0 to its peak.
        decay: share of the training, at its end, over which the rate falls to 0 along half a cosine. By default the
            rate falls as soon as the warm-up is over.
        clip: the gradient's largest norm; ``None`` for no clipping.
        average: decay of the exponential moving average of the weights, which is what a training ends with; ``None``
            to end with the last weights.
        accumulate: batches whose gradients are added up to one step.
        precision: ``no`` (float32), ``bf16`` or ``fp16``: accelerate's mixed precision.
        validate_every: steps between validations; the weights of the best one are what a training ends with.
        patience: validations without an improvement that end a training early; ``None`` for no early end.
        seconds: end after so much training time even if steps are left, the schedule shortened to match.
        save_every: seconds between checkpoints.
        compile: run the step under ``torch.compile`` and, on CUDA, as one graph; the compiler's time is not counted.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.02
    decay: float = 1.0
    clip: float | None = 5.0
    average: float | None = None
    accumulate: int = 1
    precision: str = "no"
    validate_every: int = 1000
    patience: int | None = None
    seconds: float | None = None
    save_every: float = 60.0
    compile: bool = False

    def __post_init__(self):
        check_recipe(vars(self))

    def rate(self, progress: float) -> float:
        """The learning rate when the share ``progress`` of the training is done."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        peak_end = max(self.warmup, 1 - self.decay)
        if progress <= peak_end:
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - peak_end) / (1 - peak_end)))


def check_recipe(values: dict[str, Any]) -> None:
    """Raise a ValueError for a value that no training can have.

    A script's options become a ``Recipe`` only when the number of steps is known, and that is after the data are read.
    They call this function themselves, so that a bad value is refused before that work.

    Args:
        values: some or all of a recipe's values by their names. Other names, and values of ``None``, are ignored.
    """
    values = {name: value for name, value in values.items() if value is not None}
    positive = ("steps", "lr", "accumulate", "validate_every", "save_every", "clip", "patience", "seconds")
    check_positive(**{name: values[name] for name in positive if name in values})
    if not 0 <= values.get("weight_decay", 0.0) < math.inf:
        raise ValueError(f"weight_decay must not be negative, and finite, but is {values['weight_decay']}")
    for name in ("warmup", "decay"):
        if not 0 <= values.get(name, 0.0) <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {values[name]}")
    if not 0 < values.get("average", 0.5) < 1:
        raise ValueError(f"average must lie between 0 and 1, not {values['average']}")
    if values.get("precision", "no") not in PRECISIONS:
        raise ValueError(f"unknown precision {values['precision']!r}; known: {', '.join(PRECISIONS)}")
