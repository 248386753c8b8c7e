"""The bounds of what a transform of torch's takes, and what a flow says of values that lie beyond them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

Limits = tuple[float | Tensor | None, float | Tensor | None]


def bounds(constraint: constraints.Constraint) -> Limits | None:
    """The lower and the upper bound of every number by itself; ``None`` for a constraint of no such kind."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    limits = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    return None if limits == (None, None) else limits


def within(limits: Limits | None, values: Tensor, scoring: bool, function: Callable) -> tuple[Tensor, Tensor]:
    """``function(values)``, outputs and log-determinants ``(batch,)``, of values that lie beyond no bound.

    Rows in which one does are ``nowhere``. Neither a bound itself nor NaN lies beyond.
    """
    if limits is None:
        return function(values)
    lower, upper = limits
    if upper is None:
        beyond, inside = values < lower, lower + 1.0
    elif lower is None:
        beyond, inside = values > upper, upper - 1.0
    else:
        beyond, inside = (values < lower) | (values > upper), (lower + upper) / 2
    outputs, log_det = function(torch.where(beyond, inside, values))
    return nowhere(beyond, outputs, log_det, scoring)


def nowhere(beyond: Tensor, outputs: Tensor, log_det: Tensor, scoring: bool) -> tuple[Tensor, Tensor]:
    """Rows in which something is marked become data of density 0 (noise 0, log|det| −∞), or no datum (NaN)."""
    rows = beyond.reshape(len(beyond), -1).any(1)
    every = rows.view(-1, *[1] * (outputs.dim() - 1))
    if scoring:
        return outputs.masked_fill(every, 0.0), log_det.masked_fill(rows, -math.inf)
    return outputs.masked_fill(every, math.nan), log_det.masked_fill(rows, math.nan)
