"""What modules say of themselves in one line: their masks, shapes and numbers of parameters in words."""

import torch
from torch import Tensor, nn

from adapters.masks import checkerboard_mask, half_mask


def mask_in_words(mask: Tensor) -> str:
    """A mask in a few words, however many entries it has.

    >>> mask_in_words(checkerboard_mask(28, 28))
    'chequerboard 28×28, 392 of 784 unchanged'
    >>> mask_in_words(1 - half_mask(5))
    'second half of 5, 3 of 5 unchanged'
    """
    size = shape_in_words(mask.shape)
    if mask.is_meta:
        return f"mask {size}"
    b = mask.detach().bool().cpu()
    unchanged = f"{int(b.sum())} of {b.numel()} unchanged"
    with torch.device("cpu"):
        chequerboard, half = checkerboard_mask(*b.shape).bool(), half_mask(b.numel()).bool().view(b.shape)
    if not b.any():
        return f"elementwise {size}"
    for known, name, opposite in (
        (chequerboard, "chequerboard", "inverse chequerboard"),
        (half, "first half of", "second half of"),
    ):
        if b.numel() > 1 and torch.equal(b, known):
            return f"{name} {size}, {unchanged}"
        if b.numel() > 1 and torch.equal(b, ~known):
            return f"{opposite} {size}, {unchanged}"
    return f"mask {size}, {unchanged}"


def shape_in_words(shape: tuple[int, ...]) -> str:
    """
    >>> shape_in_words((1, 28, 28))
    '1×28×28'
    """
    return "×".join(map(str, shape))


def parameters_in_words(module: nn.Module) -> str:
    """How many numbers a module learns; those that are shared count once.

    >>> parameters_in_words(nn.Linear(100, 20))
    '2,020 parameters'
    """
    return f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters"


def in_one_line(module: nn.Module, *what: str) -> str:
    """A module's class, what it is, and its number of parameters unless it has none.

    >>> in_one_line(nn.Linear(2, 3), "from 2 to 3")
    'Linear(from 2 to 3, 9 parameters)'
    """
    learned = [parameters_in_words(module)] if any(True for _ in module.parameters()) else []
    return f"{type(module).__name__}({', '.join((*what, *learned))})"
