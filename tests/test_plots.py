"""Figures for notebooks: what they show, whom they refuse, and that nothing holds on to them."""

import pickle

import pytest
import torch

from adapters import build_flow, plot_density, plot_images


@pytest.mark.parametrize("context_features", [None, 3])
def test_a_density_is_the_flows(context_features):
    torch.manual_seed(0)
    flow = build_flow("nflows-rqs", 2, context_features, layers=2, hidden_features=(8,)).double()
    context = None if context_features is None else torch.ones(1, context_features, dtype=torch.float64)
    figure = plot_density(flow, context, box=(-1, 3, 0, 2), points=8, samples=50)
    image = figure.axes[0].images[0]
    x = torch.tensor([[-0.75, 0.125], [2.75, 1.875]], dtype=torch.float64)  # the middles of two opposite corners
    rows = None if context is None else context.expand(2, -1)
    corners = torch.tensor([image.get_array()[0, 0], image.get_array()[-1, -1]], dtype=torch.float64)
    assert torch.allclose(corners, flow.log_prob(x, rows).exp())
    assert tuple(image.get_extent()) == (-1, 3, 0, 2) and len(figure.axes[1].lines[0].get_xdata()) == 50


def test_a_notebook_shows_it_once():
    figure = plot_images(torch.rand(3, 4, 4))
    assert figure._repr_png_().startswith(b"\x89PNG")  # as IPython asks of anything
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()  # nor does pyplot show it again, or keep it
    assert pickle.loads(pickle.dumps(figure)).axes


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: plot_density(build_flow("masked-affine", 3)), "over 2 coordinates, but this one is over (3,)"),
        (lambda: plot_density(build_flow("masked-affine", 2), box=(1, 1, 0, 1)), "left < right"),
        (lambda: plot_density(build_flow("masked-affine", 2), points=0), "points must be"),
        (lambda: plot_images(torch.zeros(3, 784)), "(n, height, width), not (3, 784)"),
        (lambda: plot_images(torch.zeros(2, 3, 3), columns=0), "columns must be"),
    ],
)
def test_what_cannot_be_drawn(draw, message):
    with pytest.raises(ValueError) as error:
        draw()
    assert message in str(error.value)
