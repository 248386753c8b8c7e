"""The bounds of what a transform of torch's takes, and what a flow says of values that lie beyond them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

# The lower and the upper bound of a number; None where there is none.
Limits = tuple[float | Tensor | None, float | Tensor | None]


def bounds(constraint: constraints.Constraint) -> Limits | None:
    """The lower and the upper bound of every number by itself; ``None`` for a constraint of no such kind."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    limits = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    return None if limits == (None, None) else limits


def within(limits: Limits | None, values: Tensor, scoring: bool, function: Callable) -> tuple[Tensor, Tensor]:
    """``function(values)``, which is outputs and log-determinants ``(batch,)``, where all values lie within the limits.

    The function never sees a value beyond them, and a row that has one is ``nowhere``. The limits themselves lie
    within, and so does NaN.

    Args:
        scoring: whether the values are data, on their way to noise.
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
    """The outputs and log-determinants, but for rows in which something is marked as beyond the limits.

    If these are data (``scoring``), their density is 0: the log-determinant is −∞, beside any finite noise (0). If they
    are noise, no datum is made of it: both are NaN.
    """
    rows = beyond.reshape(len(beyond), -1).any(1)
    every = rows.view(-1, *[1] * (outputs.dim() - 1))
    if scoring:
        return outputs.masked_fill(every, 0.0), log_det.masked_fill(rows, -math.inf)
    return outputs.masked_fill(every, math.nan), log_det.masked_fill(rows, math.nan)
