"""What the pictures of several runs share: colours of densities beyond the scale, and axes that can be read."""

import itertools
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from runs.common.pictures import compare, figures
from runs.common.table import Table


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_a_density_above_the_scale_has_a_colour_of_its_own(tmp_path):
    values = np.array([[0.0, 1.0], [1.8, 4.46]])
    with figures.figure(tmp_path / "density.png") as (_, axes):
        image = figures.density(axes, values, 1.8, "learned density")
        shown = np.rint(255 * image.to_rgba(values)[..., :3]).astype(int).tolist()
        assert axes.get_title() == "learned density (up to 4.46)"
    assert tuple(shown[1][1]) == rgb(figures.OVER) and shown[1][0] != shown[1][1]


def test_so_has_one_in_an_animation(tmp_path):
    path = figures.save_animation(tmp_path / "forming.gif", [np.array([[0.0, 1.0], [1.8, 4.46]])], 1.8)
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))[::-1]  # the first row of the density is the lowest one
    assert tuple(pixels[-1, -1]) == rgb(figures.OVER) and tuple(pixels[-1, 0]) != rgb(figures.OVER)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.025, 1.05, 6.0, 400.0])
def test_the_labels_of_the_times_do_not_overlap(factor, tmp_path, monkeypatch):
    def overlap(drawing, path):
        drawing.draw_without_rendering()
        for axis in drawing.axes:
            low, high = axis.get_xlim()
            boxes = [
                label.get_window_extent()
                for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
                if low <= place <= high
            ]
            assert len(boxes) >= 1
            looked_at.append(axis)
            boxes.sort(key=lambda box: box.x0)
            gaps.extend(after.x0 - before.x1 for before, after in itertools.pairwise(boxes))

    gaps: list[float] = []
    looked_at: list[Axes] = []
    monkeypatch.setattr(sys.modules[figures.figure.__module__], "save", overlap)
    names = ["my_layer:SoftsignCoupling", "masked-affine"]
    times = [{kind: {"ms": 11.04 * scale, "ratio": 1.0} for kind in compare.KINDS} for scale in (1.0, factor)]
    table = Table({"task": "chequerboard"}, {names[0]: {"times": times[0]}, names[1]: {"times": times[1]}})
    compare.draw_times(table, names, tmp_path / "times.png")
    assert looked_at and min(gaps, default=1) > 0
    assert not plt.get_fignums()


def test_the_lowest_panel_of_each_column_has_its_seconds(tmp_path, monkeypatch):
    def look(drawing, path):
        shown.extend(axis.xaxis.get_tick_params()["labelbottom"] for axis in drawing.axes if axis.axison)

    shown: list[bool] = []
    monkeypatch.setattr(sys.modules[figures.figure.__module__], "save", look)
    training = {"budget": "1s", "seed": 0, "score": 0.1, "seconds": 1.0, "curve": [[0.5, 0.3], [1.0, 0.1]]}
    names = ["masked-affine", "nflows-affine", "zuko-nsf", "my_layer:MyLayer"]
    table = Table({"task": "chequerboard", "budget": ["1s"]}, {name: {"trainings": [training]} for name in names})
    compare.draw_quality(table, names, tmp_path / "quality.png")
    assert shown == [False, True, True, True]


@pytest.mark.parametrize("steps", [(3,), (1, 2), (7, 500, 12_000)])
def test_steps_are_whole_numbers(steps, tmp_path):
    with figures.figure(tmp_path / "curve.png") as (_, axes):
        figures.curve(axes, steps, [1.0] * len(steps), smooth=9, label="training")
        figures.steps_axis(axes)
        low, high = axes.get_xlim()
        shown = [place for place in axes.get_xticks() if low <= place <= high]
    assert shown and all(place == round(place) for place in shown)
    assert (axes.lines[1].get_marker() == "o") == (len(steps) == 1)  # a line through one point can't be seen
