import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters import checkerboard_mask, half_mask, random_mask


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


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="sizes of at least 1"):
        checkerboard_mask(*shape)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        half_mask(0)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        random_mask(-2)
