"""The pictures of runs/compare.py, from compare.json and from what it keeps of each flow in ``learned``."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from adapters.checkpoint import write_atomically
from runs.common.contestants import REFERENCE
from runs.common.cost import KINDS
from runs.common.pictures import figures
from runs.common.table import Table, mean_score

NAMED = 8  # curves in the legend
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
        draw_curves(table, names, out / "quality.png"),
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
            title = name
            if name in learned:
                row = table.rows[name]
                score = "fails a gate" if "gate_failures" in row else f"{mean_score(row)[0]:#.3g} {table.task.unit}"
                title = f"{name}\n{score}"
            axis.set_title(title, fontsize=7.5, pad=3)
        highest = max((picture.max() for picture in panels.values() if picture is not None), default=0)
        if true is not None and highest > style["vmax"]:
            note = f"light blue: more than {figures.HEADROOM:g} times the true maximum"
            drawing.supxlabel(note, fontsize=7, color=figures.FAINT)
    return path


def draw_curves(table: Table, names: list[str], path: Path) -> Path:
    """Training loss against time, the first seed's: the best few by name, the others faint."""
    task = table.task
    with figures.figure(path, size=(6.4, 3.8)) as (_, axes):
        shown: list[float] = []
        for place, name in reversed(list(enumerate(names))):
            curve = np.array(table.rows[name]["curves"].get("0", []))
            if not len(curve):
                continue
            seconds, losses = curve.T
            half = max(1, len(losses) // 30)
            smooth = [np.median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
            shown += smooth[half:]
            style = {"color": figures.MANY[place], "label": name} if place < NAMED else {"color": "#d5dadd"}
            if name == REFERENCE:
                style["color"] = figures.ACCENT
            width = 1.8 if name.startswith("masked") else 1
            axes.plot(seconds, smooth, linewidth=width, zorder=3 - place / 100, **style)
        logarithmic, limits = loss_axis(shown, task.measure == "KL", task.higher_is_better)
        if logarithmic:
            axes.set_yscale("log", nonpositive="clip")
        if limits is not None:
            axes.set_ylim(*limits)
        if logarithmic:
            figures.log_ticks(axes.yaxis)
        axes.set(xlabel="seconds of training", ylabel=f"{task.measure} of the batches ({task.unit})")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return path


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
                    f"{value:.3g}" if value < 1000 else f"{value:,.0f}", (value, place), (5, 0),
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
