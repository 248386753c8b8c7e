"""Binary masks b ∈ {0, 1}^D that tell a coupling layer which coordinates to leave alone.

The convention, here and everywhere in this package: **1 = passes unchanged, 0 = transformed** (equation 15 of the
exercise; zuko and distrax agree). nflows' own coupling layers mean the opposite by 1; only
``catalogue/nflows.py`` knows.
"""

from numbers import Integral

import torch
from torch import Tensor

from adapters.checks import shown


def checkerboard_mask(*shape: int) -> Tensor:
    """The chequerboard of Dinh et al. (2017), figure 3: 1 where the coordinates' indices sum to an even number.

    ``checkerboard_mask(28, 28)`` is the image mask of Real NVP; ``checkerboard_mask(D)`` alternates 1, 0, 1, 0, …

    Returns:
        a float tensor of the given shape; ``1 - mask`` is its inverse, for the next layer.

    Raises:
        ValueError: if the shape is empty or has a size below 1.

    >>> checkerboard_mask(2, 3)
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    index_sum = sum(torch.meshgrid(*map(torch.arange, _sizes(*shape)), indexing="ij"))
    return (index_sum % 2 == 0).float()


def random_mask(features: int, generator: torch.Generator | None = None) -> Tensor:
    """A random half (⌊D/2⌋) of the coordinates is 1. It is drawn once, here; a layer keeps it as a buffer.

    The generator may be of another device than torch's default one, on which the mask is.

    Raises:
        ValueError: if ``features`` is below 1.
        TypeError: if ``features`` is no integer, or ``generator`` is no generator.
    """
    (features,) = _sizes(features)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0), not {generator!r}"
        )
    order = torch.randperm(features, generator=generator, device=None if generator is None else generator.device)
    mask = torch.zeros(features, device=order.device)
    mask[order[: features // 2]] = 1
    return mask.to(torch.empty(0).device)


def half_mask(features: int) -> Tensor:
    """The first half (⌊D/2⌋) of the coordinates is 1.

    Raises:
        ValueError: if ``features`` is below 1.

    >>> half_mask(5)
    tensor([1., 1., 0., 0., 0.])
    """
    (features,) = _sizes(features)
    return (torch.arange(features) < features // 2).float()


def pyramid_masks(height: int, width: int) -> list[Tensor]:
    """Masks that transform each pixel once, coarse to fine, noise side first, each flattened to ``height · width``.

    On the data side the odd squares of the chequerboard are transformed, given the even ones; of these the odd rows,
    which leaves a grid of half the resolution, and so on down to one pixel (Reed et al. 2017).

    Raises:
        ValueError: if a size is below 1.

    >>> for mask in pyramid_masks(2, 2):
    ...     print(mask.tolist())
    [0.0, 1.0, 1.0, 1.0]
    [1.0, 1.0, 1.0, 0.0]
    [1.0, 0.0, 0.0, 1.0]
    """
    height, width = _sizes(height, width)
    default = torch.empty(0).device
    with torch.device("cpu"):  # how many masks there are depends on the values in them, and meta tensors have none
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        left = torch.ones(height, width, dtype=torch.bool)
        masks, step = [], 1
        while left.sum() > 1:
            for odd in ((row // step + column // step) % 2 == 1, (row // step) % 2 == 1):
                if (left & odd).any():
                    masks.append((~(left & odd)).float().flatten())
                    left = left & ~odd
            step *= 2
        masks.append((~left).float().flatten())
    return [mask.to(default) for mask in reversed(masks)]


def as_mask(mask: Tensor) -> Tensor:
    """The mask as a tensor, if a list or an array; a TypeError if it is neither."""
    try:
        return mask if isinstance(mask, Tensor) and mask.is_meta else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"a mask must be a tensor of 0 and 1, one entry per coordinate, not {shown(mask)}") from error


def check_mask(mask: Tensor) -> Tensor:
    """The mask itself, if a coupling layer can use it.

    All zeros is allowed: the networks then see nothing, and the layer is an elementwise map, the only kind of
    coupling there is in one dimension. All ones is not: the layer would be the identity, its networks never trained.
    A mask on the meta device has no values to be wrong.

    Raises:
        ValueError: if the mask is empty, all ones, or holds anything but 0 and 1.
        TypeError: for what is no tensor, nor can become one.
    """
    mask = as_mask(mask)
    if mask.numel() == 0:
        raise ValueError(f"the mask is empty (shape {tuple(mask.shape)}); it needs one entry per coordinate")
    if mask.dim() == 0:
        raise ValueError(f"a mask has one entry per coordinate, but this one is a single number, {shown(mask)}")
    if mask.is_meta:
        return mask
    if not torch.all((mask == 0) | (mask == 1)):
        wrong = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(f"a mask holds only 0 (transformed) and 1 (unchanged), but this one holds {wrong}")
    if torch.all(mask == 1):
        raise ValueError("the mask is all ones: nothing would be transformed and the networks would never be trained")
    return mask


def _sizes(*sizes: int) -> tuple[int, ...]:
    if any(not isinstance(size, Integral) or isinstance(size, bool) for size in sizes):
        raise TypeError(
            f"a mask needs sizes that are integers, one by one, such as 28, 28, not {', '.join(map(repr, sizes))}"
        )
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"a mask needs sizes of at least 1, not {sizes}")
    return tuple(map(int, sizes))
