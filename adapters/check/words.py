"""Numbers, rows and names as the report writes them."""

import math

import torch
from torch import Tensor

from adapters.check.measure import EXACT
from adapters.check.passes import Pass
from adapters.check.subject import FORWARD

PRIMED = "z'"


def smallest(x: Tensor, errors: Tensor, tolerance: float) -> int:
    """The row with the smallest numbers among those that are wrong."""
    sizes = x.flatten(1).abs().sum(1)
    return int(torch.where(errors <= tolerance, math.inf, sizes).argmin())


def z_is(p: Pass, row: int) -> str:
    """What went in, named as in the exercise: z forwards, z' backwards."""
    return f"{'z' if p.direction == FORWARD else PRIMED} = {numbers(p.x[row])}"


def numbers(values: Tensor) -> str:
    """(0.31, −1.2), or the first four of many."""
    flat = values.detach().flatten().tolist()
    if len(flat) == 1:
        return number(flat[0])
    return f"({', '.join(map(number, flat[:4]))}{', …' if len(flat) > 4 else ''})"


def number(value: Tensor | float) -> str:
    """Four digits."""
    return f"{float(value):.4g}".replace("-", "−")


def offset(offsets: Tensor) -> str:
    """What is said where all rows are off by one number."""
    same = len(offsets) > 1 and (offsets - offsets[0]).abs().max() < EXACT
    return f"; off by the same {number(offsets[0])} in every row" if same else ""


def some(names: list[str]) -> str:
    """The first three of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def largest(errors: Tensor) -> str:
    """The order of magnitude of the largest error."""
    return f"{float(errors.max()):.0e}"


def short(dtype: torch.dtype) -> str:
    """Without ``torch.``."""
    return str(dtype).removeprefix("torch.")
