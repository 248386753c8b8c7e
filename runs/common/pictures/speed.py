"""The figure of ``compare.py --task speed``."""

import itertools
from pathlib import Path
from typing import Any

from runs.common.contestants import OURS, REFERENCE
from runs.common.pictures import figures

UNITS = {"ms": "training step (ms)", "mib": "memory of a step (MiB)"}
SWEEPS = {"width": "D (4 layers of 64×64)", "depth": "layers (D = 2, 8×8)"}


def draw_growth(metrics: dict[str, Any], out: Path) -> Path:
    """Step time and memory against D and against layers, ``growth.png``.

    Args:
        metrics: what ``speed.measure_speed`` gives, or the same read from metrics.json, whose keys are all strings.
        out: its directory.
    """
    path = out / "growth.png"
    names = list(metrics["per_layer_ms"])
    with figures.figure(path, 2, 2, size=(8.6, 6), sharex="col") as (drawing, axes):
        for row, unit in zip(axes, UNITS, strict=True):
            for axis, sweep in zip(row, SWEEPS, strict=True):
                sizes = [int(size) for size in metrics[sweep]]
                for colour, name in zip(itertools.cycle(figures.MANY), names, strict=False):
                    values = [measured[name][unit] for measured in metrics[sweep].values()]
                    ours = name in OURS
                    axis.plot(
                        sizes, values, "o-" if ours else ".-", color=figures.ACCENT if name == REFERENCE else colour,
                        linewidth=1.8 if ours else 1, markersize=3.5, label=name, zorder=3 if ours else 2,
                    )  # fmt: skip
                axis.set(yscale="log", ylabel=UNITS[unit] if axis is row[0] else "")
                axis.set_xscale("log", base=2)
                axis.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
                figures.log_ticks(axis.yaxis)
        for axis, label in zip(axes[1], SWEEPS.values(), strict=True):
            axis.set_xlabel(label)
        drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return path
