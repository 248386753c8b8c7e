"""The look that all pictures share, and the pictures that several runs draw."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from adapters.checkpoint import write_atomically
from adapters.plots import DENSITY, GAP, INK, draw_density, draw_points, mosaic
from adapters.plots import OVER as OVER

ACCENT = "#c8553d"
FAINT = "#5d6b75"
SERIES = (INK, "#4f8a8b", "#c9973f", ACCENT)  # one colour for each of several curves
# For more curves than that; ``ACCENT`` stays apart from all of them.
MANY = ("#22303c", "#2a9d9d", "#c9973f", "#7a5ea8", "#3f7fd0", "#7d9a3a", "#c67fb0", "#8c6d5a", "#58b5e0", "#9aa5ad")
# For ten classes of points on grey.
CLASSES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#f27ccf", "#111111", "#c2b500", "#17c3d9")
HEADROOM = 1.3  # the colours of densities end at so many times the true maximum
LABEL = 11
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5ad",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}


def save(drawing: Figure, path: Path, **options) -> Path:
    """As a PNG, whole or not at all."""
    return write_atomically(path, lambda unfinished: drawing.savefig(unfinished, format="png", **options))


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 4), **subplots) -> Iterator:
    """A figure and its axes in the shared look, saved to ``path`` on leaving."""
    with plt.rc_context(STYLE):
        drawing, axes = plt.subplots(rows, columns, figsize=size, **subplots)
        try:
            yield drawing, axes
            save(drawing, path)
        finally:
            plt.close(drawing)


def signed(value: float) -> str:
    """A number to one decimal place, with the minus sign that the axes have, too."""
    return f"{value:.1f}".replace("-", "−")


def unit_square(axes: Axes, title: str) -> None:
    """Plots of the toy densities show (0, 1)²."""
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], title=title, aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(True)


def density(axes: Axes, values: np.ndarray, top: float, title: str) -> AxesImage:
    """A density on a grid over (0, 1)², ``values[row, column]`` with row along the second coordinate.

    What lies above ``top`` has the colour ``OVER``, and the title says how high the density goes.
    """
    unit_square(axes, title)
    return draw_density(axes, values, (0, 1, 0, 1), top, title)


def density_scale(drawing: Figure, image: AxesImage, axes: Sequence[Axes], above: bool) -> None:
    """The colours of a density beside it; if some of it lies above their end, also what shows that, in words."""
    bar = drawing.colorbar(image, ax=axes, shrink=0.8, label="density", extend="max" if above else "neither")
    if above:
        top = image.get_clim()[1]
        bar.ax.set_title(f"light blue:\nabove {top:.3g}", fontsize=8, color=INK, pad=14)


def scatter(axes: Axes, points: np.ndarray, title: str) -> None:
    """Points over (0, 1)², as many as stay distinguishable."""
    unit_square(axes, title)
    draw_points(axes, points)


def curve(axes: Axes, steps: Sequence[int], values: Sequence[float], smooth: int, label: str) -> None:
    """A noisy training curve, faint, under its running median; of a very short training a point."""
    axes.plot(steps, values, color=INK, alpha=0.2, linewidth=0.6)
    half = smooth // 2
    median = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    marker = "o" if len(values) == 1 else ""  # a line through a single point would not be seen
    axes.plot(steps, median, marker=marker, color=INK, markersize=3, linewidth=1.2, label=label)


def steps_axis(axes: Axes) -> None:
    """Steps of a training are whole numbers."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def save_animation(path: Path, densities: list[np.ndarray], top: float) -> Path:
    """Densities on a grid as a GIF, on one colour scale, that holds its last frame for two seconds.

    What lies above ``top`` has the colour ``OVER``, which is the last one of the palette.
    """
    from PIL import Image

    colours = np.rint(255 * DENSITY([*np.linspace(0, 1, 255), 2.0])[:, :3]).astype(np.uint8)
    images = []
    for values in densities:
        indices = np.where(values > top, 255, 254 * np.clip(values / top, 0, 1)).astype(np.uint8)[::-1]
        image = Image.fromarray(indices, mode="P")
        image.putpalette(colours.tobytes())
        images.append(image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST))
    durations = [80] * (len(images) - 1) + [2000]
    options = {"format": "GIF", "save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
    return write_atomically(path, lambda unfinished: images[0].save(unfinished, **options))


def image_grid(path: Path, images: np.ndarray, columns: int, labels: Sequence[str] = (), title: str = "") -> Path:
    """Images ``(n, height, width)`` with values in [0, 1], row by row, in a grid and nothing else.

    Args:
        path: of the PNG.
        images: what to show; the last row may be short.
        columns: images in a row.
        labels: one for each row, written at its left.
        title: a line above the grid.
    """
    height = images.shape[1]
    grid = mosaic(images, columns)
    scale = max(1, round(1200 / grid.shape[1])) if grid.shape[1] < 1200 else 1
    size = (scale * grid.shape[1] / STYLE["figure.dpi"], scale * grid.shape[0] / STYLE["figure.dpi"])
    with plt.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        drawing = plt.figure(figsize=size)
        axes = drawing.add_axes((0, 0, 1, 1))
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        for row, label in enumerate(labels):
            middle = row * (height + GAP) + height / 2
            axes.text(-4, middle, label, ha="right", va="center", color=INK, fontsize=LABEL)
        if title:
            axes.text(0, -4, title, ha="left", va="bottom", color=INK, fontsize=LABEL)
        try:
            save(drawing, path, bbox_inches="tight", pad_inches=0.06)
        finally:
            plt.close(drawing)
    return path


def reference(axes: Axes, value: float, label: str) -> None:
    """A level to compare with: a thin dashed line, named at its right end."""
    axes.axhline(value, color=FAINT, linewidth=0.8, linestyle="--")
    axes.annotate(
        label, (1, value), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        fontsize=7, color=FAINT,
    )  # fmt: skip


def log_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, … on a logarithmic axis, as plain numbers; over many decades 1, 10, 100."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
