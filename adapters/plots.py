"""Pictures of flows as matplotlib figures, for notebooks and scripts. matplotlib is imported with this module only."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from adapters.bridges import as_flow
from adapters.bridges.common.tensors import like
from adapters.checks import check_positive
from adapters.parts import event_shape_of

INK = "#22303c"
OVER = "#3fc1c9"  # a colour that the map of the densities has not, for what lies above its end
DENSITY = matplotlib.colormaps["magma"].with_extremes(over=OVER)
GAP = 2  # pixels between the images of a grid


def plot_density(
    flow: Any,
    context: Tensor | None = None,
    *,
    box: Sequence[float] = (-4, 4, -4, 4),
    points: int = 200,
    samples: int = 0,
) -> Figure:
    """The density of a flow in the plane, exp(log p(x)), beside its samples if some are asked for.

    Args:
        flow: of any library, over vectors of 2 coordinates. It is evaluated in the mode, train or eval, that it is in.
        context: one row, ``(1, C)``, for a conditional flow.
        box: left, right, bottom and top of what is shown.
        points: of the grid along either axis.
        samples: how many to draw beside the density; 0 for none.

    Returns:
        a figure, which a notebook shows as the last line of a cell, and ``figure.savefig("density.png")`` saves.

    Raises:
        TypeError: for an object of no known library.
        ValueError: for a flow that is not over 2 coordinates, an empty box, or no points.

    >>> from adapters import build_flow
    >>> figure = plot_density(build_flow("masked-affine", features=2), points=20, samples=100)
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['density (up to 0.153)', '100 samples']
    """
    flow = as_flow(flow)
    left, right, bottom, top = map(float, box)
    check_positive(points=points)
    if not (left < right and bottom < top):
        raise ValueError(f"box must be left < right, bottom < top, not {tuple(box)}")
    if (shape := event_shape_of(flow)) not in (None, (2,)):
        raise ValueError(f"a density is drawn of a flow over 2 coordinates, but this one is over {tuple(shape or ())}")
    with torch.no_grad():
        x, y = (
            low + (torch.arange(points) + 0.5) / points * (high - low) for low, high in ((left, right), (bottom, top))
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).view(-1, 2).to(like(flow))
        rows = None if context is None else context.expand(len(grid), -1)
        values = flow.log_prob(grid, rows).exp().view(points, points).cpu().numpy()
        drawn = flow.sample(samples, context).view(-1, 2).cpu().numpy() if samples else None
    figure = _figure(4.6 if drawn is None else 8.6, 4)
    axes = figure.subplots(1, 1 if drawn is None else 2, squeeze=False)[0]
    figure.colorbar(draw_density(axes[0], values, (left, right, bottom, top), title="density"), ax=axes[0])
    if drawn is not None:
        axes[1].set(xlim=(left, right), ylim=(bottom, top), aspect="equal", title=f"{samples:,} samples")
        draw_points(axes[1], drawn)
    return figure


def plot_images(images: Tensor, columns: int = 10) -> Figure:
    """Images in a grid, row by row, such as a flow's samples.

    Args:
        images: ``(n, height, width)``, values in [0, 1]; what lies beyond is shown as 0 or 1.
        columns: images in a row.

    Raises:
        ValueError: for images of another shape, or no columns.

    >>> plot_images(torch.rand(12, 28, 28), columns=6).axes[0].images[0].get_array().shape
    (58, 178)
    """
    check_positive(columns=columns)
    if images.dim() != 3 or not len(images):
        raise ValueError(f"images must have the shape (n, height, width), not {tuple(images.shape)}")
    grid = mosaic(images.detach().cpu().float().numpy(), min(columns, len(images)))
    figure = _figure(*(max(1.0, size / 40) for size in reversed(grid.shape)))
    axes = figure.add_subplot()
    axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return figure


def draw_density(
    axes: Axes, values: np.ndarray, box: Sequence[float], top: float | None = None, title: str = ""
) -> AxesImage:
    """A density on a grid, ``values[row, column]`` with row along the second coordinate; the title says its maximum.

    What lies above ``top``, by default the maximum, has the colour ``OVER``.

    >>> axes = Figure().add_subplot()
    >>> image = draw_density(axes, np.array([[0.0, 0.5], [1.5, 4.46]]), box=(0, 1, 0, 1), top=1.8, title="learned")
    >>> axes.get_title(), image.get_clim()
    ('learned (up to 4.46)', (0.0, 1.8))
    """
    axes.set_title(f"{title} (up to {values.max():.3g})")
    extent: Any = tuple(box)
    return axes.imshow(
        values, origin="lower", extent=extent, cmap=DENSITY, vmin=0, vmax=top or values.max(), interpolation="nearest"
    )


def draw_points(axes: Axes, points: np.ndarray) -> None:
    """Points ``(n, 2)``, small and half transparent, so that thousands of them stay distinguishable.

    >>> axes = Figure().add_subplot()
    >>> draw_points(axes, np.zeros((5, 2)))
    >>> axes.lines[0].get_xydata().shape
    (5, 2)
    """
    axes.plot(points[:, 0], points[:, 1], ".", markersize=1.6, color=INK, alpha=0.35, markeredgewidth=0)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Images ``(n, height, width)`` side by side, row by row, with NaN between them and where the last row is short.

    >>> mosaic(np.array([[[1.0]], [[2.0]], [[3.0]]]), columns=2)
    array([[ 1., nan, nan,  2.],
           [nan, nan, nan, nan],
           [nan, nan, nan, nan],
           [ 3., nan, nan, nan]])
    """
    count, height, width = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), np.nan)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def _figure(width: float, height: float) -> Figure:
    """A figure that no window or notebook holds on to, and that a notebook shows once."""
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
