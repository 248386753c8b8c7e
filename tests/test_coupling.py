"""The masked coupling layer against the exercise's equations 15, 16 and 17, and its packed form against itself."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms import CompositeTransform
from torch import nn
from torch.testing import assert_close

from adapters import MaskedCouplingLayer, checkerboard_mask, random_mask
from adapters.layers.packed import PackedAffineCouplingLayer, PackedComposite
from adapters.networks import MAX_LOG_SCALE, MLP, ConvNet
from tests.laws import batch, randomise


def textbook(mask, context_features=None):
    D = mask.numel()
    s, t = (MLP(D, D, (7,), context_features) for _ in range(2))
    return randomise(MaskedCouplingLayer(s, t, mask))


def numpy_networks(layer, masked):
    with torch.no_grad():
        return layer.scale_net(torch.from_numpy(masked)).numpy(), layer.translation_net(
            torch.from_numpy(masked)
        ).numpy()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), D=st.integers(1, 40), seed=st.integers(0, 999))
def test_equations_15_16_17(data, D, seed):
    b = np.array(data.draw(st.lists(st.integers(0, 1), min_size=D, max_size=D).filter(lambda b: not all(b))), float)
    layer = textbook(torch.from_numpy(b))
    z = batch(3, D, seed=seed).numpy()
    s, t = numpy_networks(layer, b * z)
    equation_15 = b * z + (1 - b) * (z * np.exp(s) + t)
    equation_16 = b * z + (1 - b) * ((z - t) * np.exp(-s))
    equation_17 = ((1 - b) * s).sum(1)
    forward, log_det = layer(torch.from_numpy(z))
    assert_close(forward.detach().numpy(), equation_15, atol=1e-12, rtol=1e-12)
    assert_close(log_det.detach().numpy(), equation_17, atol=1e-12, rtol=1e-12)
    inverse, inverse_log_det = layer.inverse(torch.from_numpy(z))
    assert_close(inverse.detach().numpy(), equation_16, atol=1e-12, rtol=1e-12)
    assert_close(inverse_log_det.detach().numpy(), -equation_17, atol=1e-12, rtol=1e-12)


class Constant(nn.Module):
    """A network that says the same number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand_as(x)


@settings(deadline=None, max_examples=30)
@given(D=st.integers(2, 20), scale=st.floats(-8, 8), seed=st.integers(0, 999))
def test_round_trip_over_scales_in_float32(D, scale, seed):
    layer = MaskedCouplingLayer(Constant(scale), Constant(0.5), random_mask(D, torch.Generator().manual_seed(seed)))
    z = batch(5, D, seed=seed).float()
    back, _ = layer.inverse(layer(z)[0])
    # z' = z e^s + t rounds at the size of t, which e^-s then magnifies.
    assert_close(back, z, rtol=1e-5, atol=1e-6 * (1 + math.exp(-scale)))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_masked_positions_are_bitwise_unchanged(bad, direction):
    """Also where the networks say inf or NaN, also −0.0; and no NaN reaches a gradient from there."""
    mask = checkerboard_mask(6)

    class BadWhereMasked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, z):
            return torch.where(mask == 1, bad, 0.1) * self.weight + 0 * z

    layer = MaskedCouplingLayer(BadWhereMasked(), BadWhereMasked(), mask)
    z = torch.tensor([[-0.0, 1.0, 1e-45, 2.0, 3.3e38, 3.0]], requires_grad=True)
    y, log_det = getattr(layer, direction)(z)
    kept = mask == 1
    assert torch.equal(y[:, kept].view(torch.int32), z[:, kept].view(torch.int32))
    assert log_det.isfinite().all() and y.isfinite().all()
    (y[:, ~kept].sum() + log_det.sum()).backward()
    assert layer.scale_net.weight.grad[~kept].isfinite().all() and z.grad.isfinite().all()


def test_an_input_that_is_not_finite_stays_in_its_own_coordinate():
    layer = textbook(torch.tensor([1.0, 0.0, 0.0]))
    y, _ = layer(torch.tensor([[0.5, math.inf, 1.0]], dtype=torch.float64))
    clean, _ = layer(torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64))
    assert y[0, 0] == clean[0, 0] and y[0, 2] == clean[0, 2]


def test_mask_is_a_buffer_that_travels():
    layer = textbook(checkerboard_mask(4))
    other = MaskedCouplingLayer(MLP(4, 4, (7,)), MLP(4, 4, (7,)), 1 - checkerboard_mask(4)).double()
    other.load_state_dict(layer.state_dict())
    z = batch(3, 4)
    assert_close(other(z), layer(z), atol=0, rtol=0)
    assert "mask" in dict(layer.named_buffers())


def test_1_means_unchanged():
    mask = torch.tensor([1.0, 0.0])
    z = batch(8, 2)
    y, _ = textbook(mask)(z)
    assert torch.equal(y[:, 0], z[:, 0]) and not torch.isclose(y[:, 1], z[:, 1]).any()


def test_all_zeros_mask_is_an_elementwise_affine_map():
    layer = textbook(torch.zeros(3))
    y, log_det = layer(batch(4, 3))
    slope = (y[1:] - y[:-1]) / (batch(4, 3)[1:] - batch(4, 3)[:-1])
    assert_close(slope, slope[:1].expand(3, 3))
    assert_close(log_det, slope[:1].log().sum().expand(4))


@pytest.mark.parametrize("scale_bound", [None, 0.5, 2.0, 7.0])
def test_the_log_scale_starts_as_fast_as_the_shift(scale_bound):
    """∂s/∂s̃ = 1 at s̃ = 0 under any bound, and |s| stays within it."""
    layer = PackedAffineCouplingLayer(MLP(1, 2), torch.tensor([1.0, 0.0]), scale_bound)
    parameters = torch.zeros(3, 2, requires_grad=True)
    _, log_det = layer.elementwise(torch.zeros(3, 1), parameters)
    (slopes,) = torch.autograd.grad(log_det.sum(), parameters)
    assert_close(slopes[:, 0], torch.ones(3))
    _, steep = layer.elementwise(torch.zeros(3, 1), torch.full((3, 2), 1e4))
    assert_close(steep, torch.full((3,), MAX_LOG_SCALE if scale_bound is None else scale_bound))


@pytest.mark.parametrize("scale_bound", [None, 1.7])
@pytest.mark.parametrize("features", [2, 5, 30])
def test_packed_form_is_the_textbook_form(features, scale_bound):
    """The packed layer's weights, embedded in full-width networks, give the same outputs and log-determinants."""
    mask = random_mask(features, torch.Generator().manual_seed(features))
    unchanged, transformed = int(mask.sum()), int((1 - mask).sum())
    packed = randomise(PackedAffineCouplingLayer(MLP(unchanged, 2 * transformed, (9,)), mask, scale_bound))
    first, last = packed.conditioner[0], packed.conditioner[-1]

    def full_width(rows: slice) -> MLP:
        network = MLP(features, features, (9,)).double()
        with torch.no_grad():
            network[0].weight.zero_()
            network[0].weight[:, mask == 1] = first.weight
            network[0].bias.copy_(first.bias)
            network[-1].weight[mask == 0] = last.weight[rows]
            network[-1].bias[mask == 0] = last.bias[rows]
        return network

    class Bounded(nn.Sequential):
        def forward(self, z):
            if scale_bound is None:
                return super().forward(z)
            bound = torch.zeros(features, dtype=z.dtype).index_copy(0, packed.transformed, packed.scale_bound.detach())
            return bound * (super().forward(z) / scale_bound).tanh()

    embedded = MaskedCouplingLayer(
        Bounded(full_width(slice(0, transformed))), full_width(slice(transformed, None)), mask
    )
    z = batch(6, features)
    assert_close(packed(z), embedded(z), atol=1e-12, rtol=1e-12)
    assert_close(packed.inverse(z), embedded.inverse(z), atol=1e-12, rtol=1e-12)


def test_packed_layer_starts_at_the_identity():
    z = batch(3, 6).float()
    y, log_det = PackedAffineCouplingLayer(MLP(3, 6), checkerboard_mask(6))(z)
    assert torch.equal(y, z) and torch.equal(log_det, torch.zeros(3))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([]), r"mask is empty \(shape \(0,\)\)"),
        (torch.tensor([1.0, 0.5]), "holds 0.5"),
        (torch.tensor([1, 0, 2]), "holds 2"),
        (torch.tensor([1.0, math.nan]), "holds nan"),
        (torch.ones(3), "all ones: nothing would be transformed"),
    ],
)
@pytest.mark.parametrize("layer", [lambda mask: MaskedCouplingLayer(MLP(2, 2), MLP(2, 2), mask),
                                   lambda mask: PackedAffineCouplingLayer(MLP(2, 2), mask)])  # fmt: skip
def test_bad_masks_are_refused_at_construction(layer, mask, message):
    with pytest.raises(ValueError, match=message):
        layer(mask)


def test_bad_networks_and_inputs_are_refused():
    mask = torch.tensor([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"scale_net must return shape \(4, 3\), but returned \(4, 1\)"):
        MaskedCouplingLayer(MLP(3, 1), MLP(3, 3), mask)(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"translation_net must return shape \(4, 3\), but returned \(4, 2\)"):
        MaskedCouplingLayer(MLP(3, 3), MLP(3, 2), mask)(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"conditioner must return shape \(4, 4\), but returned \(4, 3\)"):
        PackedAffineCouplingLayer(MLP(1, 3), mask)(torch.randn(4, 3))
    for layer in (MaskedCouplingLayer(MLP(3, 3), MLP(3, 3), mask), PackedAffineCouplingLayer(MLP(1, 4), mask)):
        for shape in [(4, 2), (3,), (4, 1, 3), ()]:
            with pytest.raises(ValueError, match=r"takes inputs of shape \(batch, 3\), not"):
                layer(torch.randn(shape))
    with pytest.raises(ValueError, match="scale_bound must be positive, not -1"):
        PackedAffineCouplingLayer(MLP(1, 4), mask, scale_bound=-1)
    with pytest.raises(TypeError, match=r"context of shape \(4, 2\) was given, but Linear takes no context"):
        MaskedCouplingLayer(nn.Linear(3, 3), nn.Linear(3, 3), mask)(torch.randn(4, 3), torch.randn(4, 2))


def test_conv_net_reads_and_writes_its_own_pixels_only():
    """Also on the grid of half the resolution, where the rest of the image is left out."""
    odd = checkerboard_mask(8, 8).flatten()
    coarse = torch.zeros(8, 8)
    coarse[::2, ::2] = 1 - checkerboard_mask(4, 4)
    even = torch.zeros(8, 8)
    even[::2, ::2] = checkerboard_mask(4, 4)
    for reads, writes, side in ((1 - odd, odd, 8), (even.flatten(), coarse.flatten(), 4)):
        network = randomise(ConvNet(reads, writes, 3, (6, 6), context_features=2, activation="tanh"))
        assert network.side == side
        x, context = batch(2, int(reads.sum())).requires_grad_(), batch(2, 2, seed=5)
        y = network(x, context)
        assert y.shape == (2, 3 * int(writes.sum()))
        # parameter-major: the first output is the first parameter of the first written pixel, which sees its neighbours
        (gradient,) = torch.autograd.grad(y[0, 0], x)
        first = writes.view(8, 8).nonzero()[0]
        distance = (reads.view(8, 8).nonzero() - first).abs().amax(1)
        assert gradient[0, distance == distance.min()].abs().min() > 0 and gradient[1].abs().max() == 0
        assert (network(x, context + 1) - y).abs().min() > 0


def test_conv_net_wants_square_images_and_equal_channels():
    with pytest.raises(ValueError, match="net conv needs square images with an even side, not 50 pixels"):
        ConvNet(torch.ones(50), torch.zeros(50), 2)
    with pytest.raises(ValueError, match=r"net conv has one number of channels, so \(4, 5\) must all be equal"):
        ConvNet(torch.ones(64), torch.zeros(64), 2, (4, 5))


def composite(masks, seed=0):
    torch.manual_seed(seed)
    layers = [PackedAffineCouplingLayer(MLP(int(mask.sum()), 2 * int((1 - mask).sum())), mask) for mask in masks]
    return randomise(PackedComposite(layers))


CHECKER = checkerboard_mask(5)
SOME = torch.tensor([0.0, 1, 1, 0, 1])


@pytest.mark.parametrize(
    ("masks", "moves"),
    [
        ([CHECKER, 1 - CHECKER, CHECKER], "select swap swap"),
        ([CHECKER, CHECKER, 1 - CHECKER], "select stay swap"),
        ([torch.zeros(5), torch.zeros(5)], "select stay"),
        ([CHECKER, SOME], "select select"),
        ([CHECKER, 1 - SOME, SOME], "select select swap"),
    ],
)
@pytest.mark.parametrize("reads", [torch.ones(5), torch.tensor([1.0, 0, 1, 1, 0])])
def test_packed_layers_in_a_row_compute_what_each_alone_does(masks, moves, reads):
    torch.manual_seed(0)
    layers = [
        PackedAffineCouplingLayer(MLP(int((mask * reads).sum()), 2 * int((1 - mask).sum())), mask, reads=reads)
        for mask in masks
    ]
    packed = randomise(PackedComposite(layers))
    if reads.all():
        assert packed.moves == moves.split()
    z = batch(7, 5)
    for ours, nflows in ((packed, CompositeTransform.forward), (packed.inverse, CompositeTransform.inverse)):
        for found, expected in zip(ours(z), nflows(packed, z), strict=True):
            assert torch.equal(found, expected)


def test_a_composite_of_nothing_or_of_several_shapes_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        PackedComposite([])
    with pytest.raises(ValueError, match=r"one event shape for all, not \[\(1, 5\), \(5,\)\]"):
        composite([CHECKER, (1 - CHECKER).view(1, 5)])


def test_packed_layers_split_by_the_masks_they_are_loaded_with():
    other = composite([CHECKER, 1 - SOME], seed=1)
    z = batch(7, 5)
    for packed in (composite([CHECKER, 1 - CHECKER]), pickle.loads(pickle.dumps(composite([CHECKER, 1 - CHECKER])))):
        loaded = copy.deepcopy(packed)
        assert loaded.moves == ["select", "swap"]
        loaded.load_state_dict(other.state_dict())
        assert loaded.moves == ["select", "select"] and packed.moves == ["select", "swap"]
        assert torch.equal(loaded(z)[0], other(z)[0]) and torch.equal(loaded.inverse(z)[0], other.inverse(z)[0])
