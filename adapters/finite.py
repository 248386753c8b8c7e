"""Protection of a batch from its rows that are not finite.

Many libraries assert something about a whole batch, or iterate until an equation is solved for every row. One row of
NaN or ±inf then makes the whole call fail, or loop without an end.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Pass = Callable[..., tuple[Tensor, Tensor]]  # as an nflows Transform's forward and inverse


def with_finite_rows(run: Pass, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``run(inputs, context)``, where a row that is not finite does no harm to the other rows.

    Each such row of the inputs or of the context is replaced by the number ``HARMLESS`` before ``run`` gets it. Its
    outputs and its log-determinant are NaN. No value is read on the host, so that nothing waits for the device, and the
    other rows keep their gradients.

    Args:
        run: a transform's ``forward`` or ``inverse``.
        inputs: ``(batch, *event)``.
        context: ``(batch, C)``.

    >>> def centre(inputs, context=None):  # one row is enough to spoil the mean of all
    ...     return inputs - inputs.mean(0), torch.zeros(len(inputs))
    >>> with_finite_rows(centre, torch.tensor([[1.5], [math.inf]]))
    (tensor([[0.5000],
            [   nan]]), tensor([0., nan]))
    """
    if inputs.dim() == 0 or not inputs.is_floating_point():
        return run(inputs, context)  # run refuses such inputs
    lost = _lost(inputs)
    if context is not None and context.shape[:1] == inputs.shape[:1] and context.is_floating_point():
        lost_context = _lost(context)
        context = torch.where(_beside(lost_context, context), HARMLESS, context)
        lost = lost | lost_context
    outputs, log_det = run(torch.where(_beside(lost, inputs), HARMLESS, inputs), context)
    return outputs.masked_fill(_beside(lost, outputs), math.nan), log_det.masked_fill(lost, math.nan)


def finite_rows(method: Pass) -> Pass:
    """A decorator of a transform's ``forward`` or ``inverse``, which then runs ``with_finite_rows``.

    A transform may have an attribute ``takes_any_row``. If it is true, the method runs as it is. This is for transforms
    whose library keeps the rows apart itself.

    >>> class Shift(torch.nn.Module):
    ...     @finite_rows
    ...     def forward(self, inputs, context=None):
    ...         return inputs + 1, torch.zeros(len(inputs))
    >>> Shift()(torch.tensor([[1.0], [math.inf]]))[0]
    tensor([[2.],
            [nan]])
    """

    @wraps(method)
    def guarded(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if getattr(self, "takes_any_row", False):
            return method(self, inputs, context)
        return with_finite_rows(method.__get__(self), inputs, context)

    return guarded


HARMLESS = 0.5  # inside the domain of transforms of all numbers, of positive numbers, and of numbers in [0, 1]


def _lost(rows: Tensor) -> Tensor:
    """Which rows of ``(batch, …)`` are not finite: ``(batch,)``."""
    finite = rows.isfinite()
    return ~(finite if finite.dim() == 1 else finite.flatten(1).all(1))


def _beside(marks: Tensor, rows: Tensor) -> Tensor:
    """The marks ``(batch,)`` in a shape that broadcasts with the rows ``(batch, …)``."""
    return marks.view(-1, *[1] * (rows.dim() - 1))
