"""The pictures of runs/compare.py, from compare.json and from what it keeps of each flow in ``learned``."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from adapters.checkpoint import write_atomically
from runs.common.contestants import REFERENCE
from runs.common.cost import KINDS
from runs.common.pictures import figures
from runs.common.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HAND_WRITTEN = "hand-written"
PANELS = 3  # in a row
BEHIND = "#e1e5e8"  # the flows of other panels
GAP = 0.085  # of a panel's height, between the names at the ends of two curves
NARROWEST = 5  # an axis of times goes to at least so many times its start: differences of a few percent look small


def draw(table: Table, names: list[str], directory: Path, out: Path) -> list[Path]:
    """Every picture of the flows that have a score.

    Args:
        table: their rows.
        names: of the flows to be shown.
        directory: of the comparison, where the learned densities and samples are.
        out: directory for the pictures.
    """
    names = [name for name in table.ranked(names) if table.scored(name)]
    if not names:
        return []
    learned = {name: read_learned(directory, name) for name in names}
    return [
        draw_gallery(table, learned, out / "gallery.png"),
        draw_quality(table, names, out / "quality.png"),
        draw_times(table, names, out / "times.png"),
    ]


def save_learned(directory: Path, name: str, picture: np.ndarray) -> None:
    """Keep the density that a flow learned, or its samples, ``(height, width)``, for the gallery."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # given a path that does not end in .npy, NumPy would write to another one
            np.save(file, picture)

    write_atomically(_learned(directory, name), write)


def read_learned(directory: Path, name: str) -> np.ndarray | None:
    """What ``save_learned`` has kept; ``None`` if it is not there or damaged."""
    try:
        picture = np.load(_learned(directory, name), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    good = picture.ndim == 2 and picture.size and picture.dtype.kind in "fiu" and np.isfinite(picture).all()
    return picture if good else None


def _learned(directory: Path, name: str) -> Path:
    return directory / "learned" / f"{name.replace(':', '.').replace('/', '.')}.npy"


def draw_gallery(table: Table, learned: dict[str, np.ndarray | None], path: Path) -> Path:
    """A panel for each flow, best first: the density that it learned, or its samples."""
    panels, style = dict(learned), {"cmap": "gray", "vmin": 0, "vmax": 1}
    true = table.task.true_picture()
    if true is not None:
        panels = {"true density": true} | panels
        style = {"cmap": figures.DENSITY, "vmin": 0, "vmax": figures.HEADROOM * true.max(), "origin": "lower"}
    columns = min(range(4, 8), key=lambda n: -len(panels) % n)  # the last row as full as it can be
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = 1.6 * columns, 1.98 * rows + 0.15
    with figures.figure(path, rows, columns, size, squeeze=False) as (drawing, axes):
        drawing.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.02, wspace=0.02)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (name, picture) in zip(axes.flat, panels.items(), strict=False):
            if picture is None:
                axis.text(0.5, 0.5, "no picture kept", ha="center", va="center", fontsize=7, color=figures.FAINT)
            else:
                axis.imshow(picture, interpolation="nearest", **style)
            title = label(name)
            if name in learned:
                mean = statistics.fmean(longest_scores(table, name))
                title = f"{title}\n{'fails a gate' if table.gate_failures(name) else f'{mean:#.3g} {table.task.unit}'}"
            axis.set_title(title, fontsize=7.5, pad=3)
        highest = max((picture.max() for picture in panels.values() if picture is not None), default=0)
        if true is not None and highest > style["vmax"]:
            note = f"light blue: more than {figures.HEADROOM:g} times the true maximum"
            drawing.supxlabel(note, fontsize=7, color=figures.FAINT)
    return path


def longest_scores(table: Table, name: str) -> list[float]:
    """The scores of a flow's trainings at the longest budget that it has been trained in."""
    return next(scores for budget in reversed(table.budgets) if (scores := table.scores(name, budget)))


def draw_quality(table: Table, names: Sequence[str], path: Path) -> Path:
    """Score against time of training, a panel for each library, all others' curves faint behind it.

    A curve is the loss of the training batches at the longest budget, a running median over all seeds; if the loss is
    not the measure, it has an axis at the right. A point is the mean score on the test data after one of the budgets,
    its bar the standard deviation over the seeds.
    """
    task = table.task
    curves = {name: training_curve(table, name) for name in names}
    points = {name: test_scores(table, name) for name in names}
    panels: dict[str, list[str]] = {}
    for name in sorted(names, key=library_of):
        panels.setdefault(library_of(name), []).append(name)
    panels = dict(sorted(panels.items(), key=lambda item: item[0] != HAND_WRITTEN))  # ours first
    columns = min(PANELS, len(panels))
    rows = -(-len(panels) // columns)
    losses = [loss for curve in curves.values() for loss in curve[len(curve) // 30 :, 1]]
    shown = [] if task.loss else losses
    shown += [end for found in points.values() for end in (*(found[:, 1] - found[:, 2]), *(found[:, 1] + found[:, 2]))]
    logarithmic, limits = loss_axis(shown, task.measure == "KL", task.higher_is_better)
    size = max(6.4, 3.1 * columns + 0.4), 2.3 * rows + 0.6  # at least as wide as what is written below
    with figures.figure(path, rows, columns, size, sharex=True, sharey=True, squeeze=False) as (drawing, axes):
        first = axes[0, 0]
        if logarithmic:
            first.set_yscale("log", nonpositive="clip")
        if limits is not None:
            first.set_ylim(*limits)
        if logarithmic:
            figures.log_ticks(first.yaxis)
        for axis, library in zip(axes.flat, panels, strict=False):
            axis.set_title(library, loc="left")
            behind = axis
            if task.loss:
                behind = axis.twinx()
                behind.tick_params(labelsize=7)
                behind.set_ylim(*loss_axis(losses, False, False)[1] or (0, 1))
                axis.set(zorder=1, facecolor="none")  # the points in front of the curves
            for name in names:
                if name not in panels[library]:
                    behind.plot(*curves[name].T, color=BEHIND, linewidth=0.8, zorder=1)
            for name, colour in colours_of(panels[library]).items():
                behind.plot(*curves[name].T, color=colour, linewidth=1, alpha=0.75, zorder=2)
                axis.errorbar(
                    *points[name].T, color=colour, fmt="o", markersize=3.5, elinewidth=1.2, capsize=2, zorder=3
                )
        first.set_xlim(0, 1.04 * max(found[:, 0].max() for found in points.values()))
        for axis, library in zip(axes.flat, panels, strict=False):
            ends = {name: (points[name][-1, 0], points[name][-1, 1]) for name in panels[library]}
            name_the_ends(axis, ends, 1.26 if task.loss else 1.05)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
            axis.tick_params(labelbottom=True)
        measure = f"{task.measure} ({task.unit})"
        lines = f"{task.loss} of the training batches, at the right" if task.loss else f"{measure} of training batches"
        explained = f"lines: {lines}; points: test {task.measure} after each budget, ± its spread over seeds"
        drawing.supxlabel(f"seconds of training\n{explained}", fontsize=7.5, color=figures.INK)
        drawing.supylabel(measure, fontsize=9, color=figures.INK)
    return path


def label(name: str) -> str:
    """A flow's name where there is little room: of your own, without the file."""
    return name.rpartition(":")[2]


def library_of(name: str) -> str:
    """Whose flow that is, in the words of a panel's title."""
    if ":" in name:
        return "your own"
    library = name.partition("-")[0]
    return HAND_WRITTEN if library == REFERENCE.partition("-")[0] else library


def training_curve(table: Table, name: str) -> np.ndarray:
    """Seconds and loss of the batches, ``(n, 2)``, at the longest budget: a running median over all seeds' pairs.

    A training of so many steps takes longer at one time than at another, so each seed's seconds are stretched to the
    mean.
    """
    trainings = next(found for budget in reversed(table.budgets) if (found := table.trainings(name, budget)))
    mean = statistics.fmean(training["seconds"] for training in trainings)
    stretched = [
        (seconds * mean / training["seconds"], loss) for training in trainings for seconds, loss in training["curve"]
    ]
    pairs = np.array(sorted(stretched)).reshape(-1, 2)
    half = max(1, len(pairs) // 30)
    smooth = [np.median(pairs[max(0, i - half) : i + half + 1], axis=0) for i in range(len(pairs))]
    return np.array(smooth).reshape(-1, 2)


def test_scores(table: Table, name: str) -> np.ndarray:
    """Seconds, mean test score and its standard deviation over the seeds (0 for one seed): a row for each budget."""
    rows = []
    for budget in table.budgets:
        if trainings := table.trainings(name, budget):
            scores = [training["score"] for training in trainings]
            deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
            seconds = statistics.fmean(training["seconds"] for training in trainings)
            rows.append((seconds, statistics.fmean(scores), deviation))
    return np.array(rows)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each flow of a panel; the reference has its own."""
    return {
        name: figures.ACCENT if name == REFERENCE else figures.MANY[place % len(figures.MANY)]
        for place, name in enumerate(names)
    }


def name_the_ends(axis: "Axes", ends: dict[str, tuple[float, float]], place: float) -> None:
    """Write each flow's name beside its last point, apart from the other names, with a line up to the panel's edge.

    Args:
        axis: of the panel.
        ends: the last point of each flow, by name.
        place: where the names begin, as a share of the panel's width.
    """
    to_share = axis.transData + axis.transAxes.inverted()
    heights = [float(np.clip(to_share.transform(end)[1], 0, 1)) for end in ends.values()]
    colours = colours_of(list(ends))
    for (name, end), height in zip(ends.items(), spread(heights, GAP), strict=True):
        line = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        axis.annotate("", end, (1, height), textcoords="axes fraction", arrowprops=line)
        axis.text(place, height, label(name), transform=axis.transAxes, va="center", fontsize=7, color=colours[name])


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The same heights, moved apart by as little as it takes for each two to be ``gap`` apart, and back below 1."""
    moved, lowest = [0.0] * len(heights), -math.inf
    order = sorted(range(len(heights)), key=heights.__getitem__)
    for place in order:
        lowest = moved[place] = max(heights[place], lowest + gap)
    highest = 1 + gap
    for place in reversed(order):
        highest = moved[place] = min(moved[place], highest - gap)
    return moved


def loss_axis(losses: ArrayLike, divergence: bool, higher_is_better: bool) -> tuple[bool, tuple[float, float] | None]:
    """Whether an axis of these losses is logarithmic, and its limits: the first steps of some would hide the rest.

    A divergence is shown on a logarithmic axis, unless no loss is positive: an estimate of a small one may be negative.
    """
    losses = np.asarray(losses)
    positive = losses[losses > 0]
    if divergence and len(positive):
        high = np.quantile(positive, 0.97)
        low = max(positive.min(), high / 1000)
        return True, (low / 1.1, 1.1 * high)
    if not len(losses):
        return False, None
    low, high = np.quantile(losses, (0.03, 1) if higher_is_better else (0, 0.97))
    margin = 0.04 * (high - low) or 1.0
    return False, (low - margin, high + margin)


def draw_times(table: Table, names: list[str], path: Path) -> Path:
    """Step, log_prob and sample time on logarithmic axes, fastest step first."""
    names = sorted(names, key=lambda name: table.rows[name]["times"]["step"]["ms"])
    with figures.figure(path, 1, 3, size=(8.4, 0.21 * len(names) + 0.9), sharey=True) as (_, axes):
        for axis, kind in zip(axes, KINDS, strict=True):
            axis.set(title=f"{kind} (ms)", xscale="log", yticks=range(len(names)), yticklabels=names)
            for place, name in enumerate(names):
                value = table.rows[name]["times"][kind]["ms"]
                colour = figures.ACCENT if name.startswith("masked") else figures.INK
                axis.axhline(place, color="#e6e9eb", linewidth=0.6, zorder=0)
                axis.plot(value, place, "o", color=colour, markersize=4.5)
                axis.annotate(
                    f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}", (value, place), (5, 0),
                    textcoords="offset points", va="center", fontsize=6, color=colour,
                )  # fmt: skip
            axis.tick_params(axis="y", length=0)
            axis.margins(x=0.18)
            low, high = axis.get_xlim()
            if high < NARROWEST * low:
                middle = math.sqrt(low * high)
                axis.set_xlim(middle / math.sqrt(NARROWEST), middle * math.sqrt(NARROWEST))
            figures.log_ticks(axis.xaxis)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
    return path
