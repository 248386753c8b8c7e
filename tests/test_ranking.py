"""runs/common/ranking.py: flows that can be told apart are, and no others."""

import numpy as np
import pytest

from runs.common.ranking import LEVEL, holm, rank_ranges, student_tails, welch


@pytest.mark.parametrize(
    ("t", "freedom", "p"), [(2.7764, 4, 0.05), (-2.7764, 4, 0.05), (12.7062, 1, 0.05), (5.0413, 8, 0.001), (0, 3, 1)]
)
def test_tails_are_those_of_the_printed_tables(t, freedom, p):
    assert student_tails(t, freedom) == pytest.approx(p, rel=1e-3)


def test_welch_takes_two_variances():
    first, second = [27.5, 21.0, 19.0, 23.6, 17.0], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5]
    assert welch(first, second) == pytest.approx(0.42293, abs=1e-5)  # as SciPy has it
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1 and welch([1.0, 1.0], [2.0, 2.0]) == 0


def test_holm_stops_at_the_first_that_is_not_significant():
    assert holm([0.04, 0.01, 0.03]) == [False, True, False]
    assert holm([0.001, 0.02, 0.03]) == [True, True, True] and holm([]) == []


def test_flows_share_the_ranks_that_their_trainings_can_not_tell():
    scores = {"far": [9.0, 9.1, 8.9], "one": [1.0, 1.2, 0.9], "other": [1.1, 0.95, 1.15], "best": [0.1, 0.11, 0.09]}
    assert rank_ranges(scores) == {"far": (4, 4), "one": (2, 3), "other": (2, 3), "best": (1, 1)}
    assert rank_ranges({"alone": [1.0, 2.0]}) == {"alone": (1, 1)}


def test_equal_flows_are_seldom_told_apart():
    """In at most a share ``LEVEL`` of all comparisons, however many flows there are and however much they vary."""
    random, comparisons, wrong = np.random.default_rng(0), 200, 0
    for _ in range(comparisons):
        scores = {str(flow): list((1 + flow) * random.standard_normal(5)) for flow in range(6)}
        wrong += any(found != (1, 6) for found in rank_ranges(scores).values())
    assert wrong <= 2 * LEVEL * comparisons
