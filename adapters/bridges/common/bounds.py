"""The bounds of the values that a transform of torch takes, and what a flow makes of values beyond them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

# The lower and the upper bound of a number; None where there is none.
Limits = tuple[float | Tensor | None, float | Tensor | None]


def bounds(constraint: constraints.Constraint) -> Limits | None:
    """The lower and the upper bound that a constraint sets to every number; ``None`` if it sets no such bounds."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    limits = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    return None if limits == (None, None) else limits


def within(limits: Limits | None, values: Tensor, scoring: bool, function: Callable) -> tuple[Tensor, Tensor]:
    """``function(values)``, outputs and log-determinants ``(batch,)``, for rows whose values all lie within the limits.

    The function never sees a value beyond the limits. A row that has such a value gets the results of ``nowhere``.
    Values at a limit lie within, and so does NaN.

    Args:
        limits: the bounds of every value; ``None`` for none.
        values: ``(batch, *event)``.
        scoring: whether the values are data, on their way to noise.
        function: a transform, or its inverse.
    """
    if limits is None:
        return function(values)
    lower, upper = limits
    if lower is not None and upper is not None:
        beyond, inside = (values < lower) | (values > upper), (lower + upper) / 2
    elif lower is not None:
        beyond, inside = values < lower, lower + 1.0
    else:
        assert upper is not None  # else there would be no limits
        beyond, inside = values > upper, upper - 1.0
    outputs, log_det = function(torch.where(beyond, inside, values))
    return nowhere(beyond, outputs, log_det, scoring)


def nowhere(beyond: Tensor, outputs: Tensor, log_det: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    """The outputs and log-determinants, replaced in all rows with a value that is marked as beyond the limits.

    Data beyond the limits (``scoring``) have density 0: their log-determinant becomes −∞, and their noise 0, which is
    as good as any finite number. Noise beyond the limits belongs to no datum: outputs and log-determinant become NaN.
    """
    rows = beyond.reshape(len(beyond), -1).any(1)
    every = rows.view(-1, *[1] * (outputs.dim() - 1))
    if scoring:
        return outputs.masked_fill(every, 0.0), log_det.masked_fill(rows, -math.inf)
    return outputs.masked_fill(every, math.nan), log_det.masked_fill(rows, math.nan)
