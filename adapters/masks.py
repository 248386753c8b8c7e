"""Binary masks b ∈ {0, 1}^D that tell a coupling layer which coordinates to leave alone.

The convention, here and everywhere in this package: **1 = passes unchanged, 0 = transformed** (equation 15 of the
exercise; zuko and distrax agree). nflows' own coupling layers mean the opposite by 1; ``catalogue/nflows.py`` is the
one place that translates.
"""

from numbers import Integral

import torch
from torch import Tensor

from adapters.checks import shown


def checkerboard_mask(*shape: int) -> Tensor:
    """The chequerboard of Dinh et al. (2017), figure 3: 1 where the indices of a coordinate add up to an even number.

    ``checkerboard_mask(28, 28)`` is the image mask of Real NVP; ``checkerboard_mask(D)`` alternates 1, 0, 1, 0, …

    Returns:
        a float tensor of the given shape. ``1 - mask`` is the mask of the other coordinates, for the next layer.

    Raises:
        ValueError: if the shape is empty or has a size below 1.
        TypeError: if a size is no integer.

    >>> checkerboard_mask(2, 3)
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    """
    indices = torch.stack(torch.meshgrid(*map(torch.arange, _sizes(*shape)), indexing="ij"))
    return (indices.sum(0) % 2 == 0).float()


def random_mask(features: int, generator: torch.Generator | None = None) -> Tensor:
    """A random half of the D coordinates, ⌊D/2⌋ of them, is 1. A layer keeps the mask that it is given.

    Args:
        features: D.
        generator: where the randomness comes from, on any device; by default torch's global one. The mask is on torch's
            default device in either case.

    Raises:
        ValueError: if ``features`` is below 1.
        TypeError: if ``features`` is no integer, or ``generator`` is no generator.

    >>> mask = random_mask(784, torch.Generator().manual_seed(0))
    >>> mask.shape, mask.sum()
    (torch.Size([784]), tensor(392.))
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
    """The first half of the D coordinates, ⌊D/2⌋ of them, is 1.

    Raises:
        ValueError: if ``features``, D, is below 1.
        TypeError: if it is no integer.

    >>> half_mask(5)
    tensor([1., 1., 0., 0., 0.])
    """
    (features,) = _sizes(features)
    return (torch.arange(features) < features // 2).float()


def pyramid_masks(height: int, width: int) -> list[Tensor]:
    """Masks that together transform each pixel exactly once, from a coarse grid to the full image (Reed et al. 2017).

    From the data side on, the first mask transforms the odd squares of the chequerboard, given the even ones. The next
    transforms the odd rows of those even squares. That leaves a grid of half the resolution, with which the same is
    done, and so on until one pixel is left, which the last mask transforms given nothing.

    Returns:
        the masks, noise side first, each flattened to ``(height · width,)``.

    Raises:
        ValueError: if a size is below 1.
        TypeError: if a size is no integer.

    >>> for mask in pyramid_masks(2, 2):
    ...     print(mask.tolist())
    [0.0, 1.0, 1.0, 1.0]
    [1.0, 1.0, 1.0, 0.0]
    [1.0, 0.0, 0.0, 1.0]
    """
    height, width = _sizes(height, width)
    default = torch.empty(0).device
    with torch.device("cpu"):  # the number of masks depends on values, which tensors on the meta device do not have
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
    """The mask as a tensor.

    Raises:
        TypeError: if it is neither a tensor nor a list or an array.

    >>> as_mask([1, 0])
    tensor([1, 0])
    """
    try:
        return mask if isinstance(mask, Tensor) and mask.is_meta else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"a mask must be a tensor of 0 and 1, one entry per coordinate, not {shown(mask)}") from error


def check_mask(mask: Tensor) -> Tensor:
    """The mask as a tensor, if a coupling layer can use it.

    A mask of zeros is allowed: the networks then see nothing, and the layer is an elementwise map. In one dimension
    there is no other coupling layer. A mask of ones is refused: the layer would be the identity, and its networks would
    never be trained. The values of a mask on the meta device can't be checked.

    Raises:
        ValueError: if the mask is empty, all ones, or holds anything but 0 and 1.
        TypeError: if it is neither a tensor nor a list or an array.

    >>> check_mask([1, 1, 2])
    Traceback (most recent call last):
    ValueError: a mask holds only 0 (transformed) and 1 (unchanged), but this one holds 2
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
    """The sizes as plain integers; an error that names them unless all are positive integers."""
    if any(not isinstance(size, Integral) or isinstance(size, bool) for size in sizes):
        raise TypeError(
            f"a mask needs sizes that are integers, one by one, such as 28, 28, not {', '.join(map(repr, sizes))}"
        )
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"a mask needs sizes of at least 1, not {sizes}")
    return tuple(map(int, sizes))
