"""Rows that are not finite, kept from a library that would fail at them.

Many a library asserts something about a whole batch, or solves an equation until every row of it is solved. One row of
NaN or ±inf then makes the batch an error, or a loop without an end.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Pass = Callable[..., tuple[Tensor, Tensor]]  # as an nflows Transform's forward and inverse


def with_finite_rows(run: Pass, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``run(inputs, context)``, outputs and log-determinants, of which no row is spoiled by another.

    A row of the inputs or of the context that is not finite becomes one of ``HARMLESS`` numbers before ``run`` sees it.
    Its outputs and its log-determinant are NaN. Nothing waits for the device, and other rows keep their gradients.
    """
    if inputs.dim() == 0 or not inputs.is_floating_point():
        return run(inputs, context)  # which refuses them
    lost = _lost(inputs)
    if context is not None and context.shape[:1] == inputs.shape[:1] and context.is_floating_point():
        lost_context = _lost(context)
        context = torch.where(_beside(lost_context, context), HARMLESS, context)
        lost = lost | lost_context
    outputs, log_det = run(torch.where(_beside(lost, inputs), HARMLESS, inputs), context)
    return outputs.masked_fill(_beside(lost, outputs), math.nan), log_det.masked_fill(lost, math.nan)


def finite_rows(method: Pass) -> Pass:
    """A ``forward`` or ``inverse`` that runs ``with_finite_rows``, unless ``takes_any_row`` is true of the transform.

    That is for a transform whose library itself keeps the rows apart, so that nothing is paid for it there.
    """

    @wraps(method)
    def guarded(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if getattr(self, "takes_any_row", False):
            return method(self, inputs, context)
        return with_finite_rows(method.__get__(self), inputs, context)

    return guarded


HARMLESS = 0.5  # inside the domain of a transform of all numbers, of the positive ones, and of those in [0, 1]


def _lost(rows: Tensor) -> Tensor:
    finite = rows.isfinite()
    return ~(finite if finite.dim() == 1 else finite.flatten(1).all(1))


def _beside(marks: Tensor, rows: Tensor) -> Tensor:
    """The marks ``(batch,)`` in a shape that broadcasts with the rows ``(batch, …)``."""
    return marks.view(-1, *[1] * (rows.dim() - 1))
