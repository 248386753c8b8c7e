import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters import MaskedCouplingLayer, checkerboard_mask, half_mask, random_mask
from adapters.masks import pyramid_masks


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_checkerboard_neighbours_differ(shape):
    mask = checkerboard_mask(*shape)
    assert mask.shape == tuple(shape) and mask.flatten()[0] == 1
    for dim in range(len(shape)):
        assert torch.all(mask.diff(dim=dim).abs() == 1)


@given(st.integers(1, 50))
def test_half_of_the_entries_are_one(features):
    for mask in (half_mask(features), random_mask(features)):
        assert mask.shape == (features,) and mask.sum() == features // 2
        assert set(mask.tolist()) <= {0.0, 1.0}
    assert torch.all(half_mask(features).diff() <= 0)


def test_random_mask_follows_its_generator():
    def draw(seed):
        return random_mask(784, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@given(st.integers(1, 17), st.integers(1, 17))
def test_a_pyramid_transforms_each_pixel_once_finest_last(height, width):
    masks = pyramid_masks(height, width)
    assert torch.equal(sum(1 - mask for mask in masks), torch.ones(height * width))
    assert masks[0].sum() == height * width - 1 and masks[0][0] == 0
    if height * width > 1:
        assert torch.equal(masks[-1], checkerboard_mask(height, width).flatten())


def test_masks_are_on_the_default_device_whatever_the_generators():
    generator = torch.Generator().manual_seed(1)
    expected = random_mask(9, generator=generator)
    after = generator.get_state()
    with torch.device("meta"):
        made = [
            random_mask(9, generator=generator.manual_seed(1)),
            random_mask(9),
            half_mask(9),
            checkerboard_mask(3, 3),
            *pyramid_masks(3, 3),
        ]
        assert torch.equal(generator.get_state(), after), "the generator given is the one that was drawn from"
        assert {mask.device.type for mask in made} == {"meta"} and {mask.numel() for mask in made} == {9}
        assert MaskedCouplingLayer(nn.Linear(9, 9), nn.Linear(9, 9), made[0])(torch.randn(2, 9))[0].shape == (2, 9)
        with torch.device("cpu"):
            assert torch.equal(random_mask(9, generator=generator.manual_seed(1)), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="sizes of at least 1"):
        checkerboard_mask(*shape)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        half_mask(0)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        random_mask(-2)
