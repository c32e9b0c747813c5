"""Tests, limits and sample sizes against scipy, direct sums and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stfbnn.decision import bounds


@given(st.integers(1, 400), st.data(), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=60)
def test_the_interval_of_errors_is_scipys_exact_one(count: int, data: st.DataObject, confidence: float) -> None:
    errors = data.draw(st.integers(0, count))
    theirs = stats.binomtest(errors, count).proportion_ci(confidence, method="exact")
    assert bounds.interval(errors, count, confidence, whole=True) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_an_interval_of_no_example_says_nothing() -> None:
    assert bounds.interval(0, 0, 0.95, whole=True) == (0, 1)
    assert bounds.interval(0.0, 0, 0.95, whole=False) == (0, 1)


@pytest.mark.parametrize("risk", [0.001, 0.05, 0.5, 0.9])
def test_p_values_of_errors_are_the_binomial_tail(risk: float) -> None:
    counts = np.repeat([1, 7, 60, 3000], 5)
    errors = np.concatenate([np.linspace(0, count, 5).astype(int) for count in (1, 7, 60, 3000)])
    expected = stats.binom.cdf(errors, counts, risk)
    np.testing.assert_allclose(bounds.binomial_p_values(errors, counts, risk), expected, rtol=1e-9, atol=1e-300)


@given(st.integers(1, 300), st.data(), st.floats(0.01, 0.5), st.floats(0.001, 0.4))
@settings(deadline=None, max_examples=100)
def test_a_test_rejects_exactly_where_the_upper_limit_is_below_the_risk(
    count: int, data: st.DataObject, risk: float, level: float
) -> None:
    errors = data.draw(st.integers(0, count))
    p_value = float(bounds.binomial_p_values(errors, count, risk))
    if abs(p_value - level) > 1e-9:
        assert (p_value <= level) == (bounds.upper_limit(errors, count, level, whole=True) <= risk)


def direct(losses: list[float], risk: float) -> float:
    """Hoeffding–Bentkus as the paper writes it, with the binomial tail added up term by term."""
    count, mean = len(losses), min(sum(losses) / len(losses), risk)
    kl = sum(p * math.log(p / q) for p, q in ((mean, risk), (1 - mean, 1 - risk)) if p > 0)
    last = min(math.ceil(sum(losses)), count)
    tail = math.fsum(math.comb(count, k) * risk**k * (1 - risk) ** (count - k) for k in range(last + 1))
    return min(1.0, math.exp(-count * kl), math.e * tail)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 0.95))
@settings(deadline=None, max_examples=150)
def test_hoeffding_bentkus_agrees_with_a_direct_computation(losses: list[float], risk: float) -> None:
    found = float(bounds.hoeffding_bentkus_p_values(sum(losses), len(losses), risk))
    assert found == pytest.approx(direct(losses, risk), rel=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.001, 0.5))
@settings(deadline=None, max_examples=100)
def test_the_limit_of_a_mean_loss_is_where_its_test_turns(losses: list[float], level: float) -> None:
    limit = bounds.upper_limit(sum(losses), len(losses), level, whole=False)
    assert sum(losses) / len(losses) <= limit + 1e-12
    if limit < 1 - 1e-9:
        assert direct(losses, min(limit + 1e-6, 1 - 1e-12)) <= level * 1.001
        if limit > 1e-6:
            assert direct(losses, limit - 1e-7) >= level * 0.999


@pytest.mark.parametrize(("mean", "high"), [(0.1, 0.3), (0.1, 1.0), (0.4, 0.5)])
def test_hoeffding_bentkus_rejects_a_true_risk_no_more_often_than_its_level(mean: float, high: float) -> None:
    random = np.random.default_rng(0)
    sums = high * random.binomial(80, mean / high, 20_000)
    rejected = int((bounds.hoeffding_bentkus_p_values(sums, 80, mean) <= 0.1).sum())
    assert rejected <= stats.binom.ppf(1 - 1e-6, 20_000, 0.1)
    # Losses of 0 or 1 vary most, and so come nearest to the bound.
    assert high < 1 or rejected > 0.02 * 20_000


@pytest.mark.parametrize(("risk", "level"), [(0.05, 0.05), (0.1, 0.0375), (0.01, 0.001), (0.6, 0.3)])
def test_the_fewest_examples_without_loss_that_reject(risk: float, level: float) -> None:
    fewest = bounds.least_rejectable(risk, level)
    for p_values in (bounds.binomial_p_values, bounds.hoeffding_bentkus_p_values):
        assert float(p_values(0, fewest, risk)) <= level
        assert fewest == 1 or float(p_values(0, fewest - 1, risk)) > level
