"""Intervals against other implementations, brute force, and what they promise: to cover."""

from __future__ import annotations

import math
from itertools import product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm, ttest_ind
from sklearn.metrics import roc_auc_score

from stfbnn.privacy.intervals import Estimated, area, identical, mean_difference, rate, rate_difference

# Few distinct values, so that ties are the rule.
tied = st.lists(st.integers(0, 6).map(float), min_size=2, max_size=20)


def needed(repetitions: int, coverage: float) -> int:
    """How often an interval must cover: one that does so at ``coverage`` falls short of it once in a thousand times."""
    return int(binom.ppf(1e-3, repetitions, coverage))


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (3, 7), (1, 4000), (399, 400)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_rates_have_clopper_and_pearsons_interval(hits: int, count: int, confidence: float) -> None:
    found, expected = rate(hits, count, confidence), binomtest(hits, count).proportion_ci(confidence, method="exact")
    assert (found.value, found.low, found.high) == pytest.approx((hits / count, expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
def test_rates_are_covered_at_least_as_often_as_promised(share: float) -> None:
    count = 300
    covers = [(found := rate(hits, count)).low <= share <= found.high for hits in range(count + 1)]
    assert binom.pmf(np.arange(count + 1), count, share)[covers].sum() >= 0.95


def test_rate_difference_is_newcombes_own_example() -> None:
    # Newcombe (1998), table II, method 10: 56/70 − 48/80 gives .0524 to .3339, and 10/10 − 0/20 gives .6791 to 1.
    first = rate_difference((56, 48), (70, 80))
    assert (first.value, first.low, first.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    second = rate_difference((10, 0), (10, 20))
    assert (second.value, second.low, second.high) == pytest.approx((1, 0.6791, 1), abs=5e-5)


def test_mean_difference_is_welchs() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(1, 1, 30), random.normal(0, 4, 11)
    found, expected = mean_difference(first, second, 0.9), ttest_ind(first, second, equal_var=False)
    interval = expected.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert mean_difference(np.ones(3), np.zeros(4)) == Estimated(1, 1, 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tied, tied)
def test_area_and_its_variance_are_those_of_all_pairs(members: list[float], others: list[float]) -> None:
    def kernel(x: float, y: float) -> float:
        return (x > y) + 0.5 * (x == y)

    found = area(np.array(members), np.array(others))
    value = fmean(kernel(x, y) for x, y in product(members, others))
    assert found.value == pytest.approx(value)
    assert found.value == pytest.approx(roc_auc_score([1] * len(members) + [0] * len(others), members + others))
    assert 0 <= found.low <= found.value <= found.high <= 1
    # DeLong's structural components, and from their variances the interval on the logit scale.
    each = [fmean(kernel(x, y) for y in others) for x in members]
    back = [fmean(kernel(x, y) for x in members) for y in others]
    error = math.sqrt(np.var(each, ddof=1) / len(each) + np.var(back, ddof=1) / len(back))
    if error > 1e-9 and 0 < value < 1:
        reach = 1.959963985 * error / (value * (1 - value))
        centre = math.log(value / (1 - value))
        assert (found.low, found.high) == pytest.approx(
            [1 / (1 + math.exp(reach - centre)), 1 / (1 + math.exp(-reach - centre))]
        )
    else:
        assert found.high - found.low == pytest.approx(1 - identical(min(len(members), len(others))))


@pytest.mark.parametrize(("distance", "counts"), [(0.0, (80, 80)), (1.0, (50, 120)), (2.5, (60, 60))])
def test_area_intervals_cover(distance: float, counts: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    truth, repetitions, covered = norm.cdf(distance / math.sqrt(2)), 600, 0
    for _ in range(repetitions):
        found = area(random.normal(distance, 1, counts[0]), random.normal(0, 1, counts[1]))
        covered += found.low <= truth <= found.high
    # Asymptotic intervals: a hundredth less is allowed for. And not much wider than they must be.
    assert needed(repetitions, 0.94) <= covered <= repetitions - 5


def test_area_of_a_perfect_attack_is_not_certain() -> None:
    # Were the true area .9, 20 disjoint pairs would all be right in 12 % of the cases.
    found = area(np.arange(20.0) + 100, np.arange(30.0))
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 20))
    turned = area(np.arange(20.0), np.arange(30.0) + 100)
    assert (turned.low, turned.high) == pytest.approx((0, 1 - found.low))


def test_shown_with_its_interval() -> None:
    assert Estimated(0.5, 0.25, 0.75).show(2) == "0.50 [0.25, 0.75]"
    assert Estimated(0.0, -0.5, 1.0).shifted(lambda value: (1 + value) / 2) == Estimated(0.5, 0.25, 1.0)
