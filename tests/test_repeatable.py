"""A test that fails can be run again as it was: its random numbers are its own, whatever ran before it."""

import random

import numpy as np
import pytest
import torch

from tests.conftest import TEST_SEED, seed_of


@pytest.fixture
def drawn():
    """What random numbers a fixture meets: fixtures draw first."""
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("case", ["first", "second"])
def test_each_test_draws_from_a_seed_of_its_own(request, case, drawn):
    seed = seed_of(request.node.nodeid)
    torch.manual_seed(seed)
    assert drawn == (torch.rand(()).item(), np.random.RandomState(seed).rand(), random.Random(seed).random())
    assert seed != seed_of(request.node.nodeid.replace(case, "third"))


def test_test_seed_asks_for_other_numbers(monkeypatch):
    before = seed_of("a test")
    monkeypatch.setattr("tests.conftest.TEST_SEED", TEST_SEED + 1)
    assert seed_of("a test") != before
