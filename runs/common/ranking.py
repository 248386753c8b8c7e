"""Which flows can be told apart after several trainings of each, and what that says of their ranks."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

LEVEL = 0.05  # the probability that any of the ranges is wrong


def rank_ranges(scores: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, int]]:
    """The best and the worst rank that each flow may have, from 1 on; lower scores are better.

    Each pair of flows is compared by Welch's t-test over their trainings, and the tests of all pairs together are
    corrected by Holm's method. A flow can't be ranked above those that are significantly better, nor below those that
    are significantly worse. All these ranges hold at once with a probability of at least 1 − ``LEVEL`` (Mogstad,
    Romano, Shaikh and Wilhelm, Inference for Ranks, 2024).

    Args:
        scores: of each flow's trainings, at least two.
    """
    pairs = list(itertools.combinations(scores, 2))
    different = holm([welch(scores[first], scores[second]) for first, second in pairs])
    better, worse = dict.fromkeys(scores, 0), dict.fromkeys(scores, 0)
    for pair, distinct in zip(pairs, different, strict=True):
        if distinct:
            winner, loser = sorted(pair, key=lambda name: statistics.fmean(scores[name]))
            better[loser] += 1
            worse[winner] += 1
    return {name: (1 + better[name], len(scores) - worse[name]) for name in scores}


def welch(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value of Welch's t-test: that two means differ, whatever the two variances are."""
    difference = statistics.fmean(first) - statistics.fmean(second)
    errors = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    if sum(errors) == 0:
        return float(difference == 0)
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, (first, second), strict=True)
    )
    return student_tails(difference / math.sqrt(sum(errors)), freedom)


def student_tails(t: float, freedom: float) -> float:
    """P(|T| > |t|) for Student's distribution with that many degrees of freedom, at least 1.

    With T = √ν tan θ the density becomes proportional to cos^(ν − 1) θ on (−π/2, π/2), whose integral is taken by the
    midpoint rule.
    """

    def integral(start: float) -> float:
        width = (math.pi / 2 - start) / 10_000
        return float((np.cos(start + width * (np.arange(10_000) + 0.5)) ** (freedom - 1)).sum() * width)

    return integral(math.atan(abs(t) / math.sqrt(freedom))) / integral(0.0)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of the tests are significant, such that with a probability of at least 1 − ``LEVEL`` none of them errs."""
    significant = [False] * len(p_values)
    for done, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > LEVEL / (len(p_values) - done):
            break
        significant[place] = True
    return significant
