"""Comparisons over seeds and tasks against scipy, brute force, published tables and simulated error rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stfbnn.benchmark.ranking import average_ranks, cliques, critical_difference, friedman, task_means
from stfbnn.benchmark.records import Record, Row
from stfbnn.benchmark.statistics import best_rows, by_task, holm, paired, standing, summary, time_to_reach
from stfbnn.errors import InputError

numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
shares = st.lists(st.floats(0, 1), min_size=1, max_size=12)


# Summaries and pairs


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=2, max_size=10))
def test_a_summary_agrees_with_the_standard_library(values: list[float]) -> None:
    found = summary(values)
    assert found.count == len(values)
    assert found.mean == pytest.approx(fmean(values), abs=1e-9)
    assert found.standard_deviation == pytest.approx(stdev(values), abs=1e-9)
    assert found.standard_error == pytest.approx(stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_value_has_no_spread() -> None:
    assert summary([0.25]) == type(summary([0.25]))(0.25, None, None, 1)
    assert paired([1.0], [2.0]) is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_paired_test_agrees_with_scipy(count: int, seed: int, level: float) -> None:
    first, second = np.random.default_rng(seed).normal(size=(2, count))
    found, expected = paired(first, second, level=level), stats.ttest_rel(first, second)
    assert found is not None
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(level)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.difference, found.standard_error) == pytest.approx(
        (np.mean(first - second), stats.sem(first - second))
    )
    mirrored = paired(second, first, level=level)
    assert mirrored is not None
    assert (mirrored.difference, mirrored.low, mirrored.high) == (-found.difference, -found.high, -found.low)
    assert mirrored.p_value == found.p_value


def test_the_paired_p_value_is_near_that_of_all_sign_changes() -> None:
    # Under the null of differences symmetric about 0 all 2^n sign patterns are equally likely: an exact test without t.
    differences = np.random.default_rng(3).normal(0.4, 1, size=14)
    means = [np.mean(differences * signs) for signs in itertools.product([-1, 1], repeat=14)]
    exact = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    found = paired(differences, np.zeros(14))
    assert found is not None
    assert 0.02 < exact < 0.8
    assert found.p_value == pytest.approx(exact, abs=0.02)


def test_the_docstring_is_right_on_three_pairs() -> None:
    # Mean 4.30 and 4.31 standard errors from 0, around the .05 quantile of two degrees of freedom, 4.3027.
    for times, significant in ((4.30, False), (4.31, True)):
        spread = np.array([-1.0, 0.0, 1.0])
        found = paired(spread + times / math.sqrt(3), np.zeros(3))
        assert found is not None
        assert found.difference / found.standard_error == pytest.approx(times)
        assert (found.p_value < 0.05) is significant
    assert stats.wilcoxon([5.0, 6.0, 7.0], method="exact").pvalue == 0.25


def test_the_correction_for_random_divisions_restores_the_error_rate() -> None:
    # Differences over splits of one data set are correlated by the share of the test set, here .1 as with UCI's: under the
    # null the corrected test is wrong in 5 %, the plain one in far more.
    rng, repeats, share, wrong = np.random.default_rng(2), 1500, 0.1, {0.0: 0, 1 / 9: 0}
    for _ in range(repeats):
        differences = math.sqrt(share) * rng.normal() + math.sqrt(1 - share) * rng.normal(size=20)
        for ratio in wrong:
            found = paired(differences, np.zeros(20), test_to_train=ratio)
            assert found is not None
            wrong[ratio] += found.p_value <= 0.05
            assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
    assert wrong[1 / 9] / repeats == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / repeats))
    assert wrong[0.0] / repeats > 0.15
    values = {"a": list(rng.normal(size=20)), "b": list(rng.normal(0.9, 1, size=20))}
    assert best_rows(table_of(values), lower_is_better=True) == {"a"}
    assert best_rows(table_of(values), lower_is_better=True, test_to_train=1 / 9) == set()


def test_differences_without_spread_are_not_certainty() -> None:
    assert paired([0.93, 0.92, 0.91], [0.92, 0.91, 0.90]) is None
    equal = paired([0.93, 0.92], [0.93, 0.92])
    assert equal is not None
    assert (equal.difference, equal.low, equal.high, equal.p_value) == (0, 0, 0, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shares)
def test_holm_rejects_what_its_definition_rejects(p_values: list[float]) -> None:
    adjusted, m = holm(p_values), len(p_values)
    for alpha in (0.01, 0.05, 0.3, 0.9):
        # The procedure as it is defined: from the smallest on, against alpha / (m - i), until the first that fails.
        rejected: set[int] = set()
        for step, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
            if p_values[index] * (m - step) > alpha:
                break
            rejected.add(index)
        assert {index for index in range(m) if adjusted[index] <= alpha} == rejected
    assert all(one >= other for one, other in zip(adjusted, p_values, strict=True))
    assert all(one <= min(1, m * other) + 1e-15 for one, other in zip(adjusted, p_values, strict=True))


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# The bold rows


def table_of(values: Mapping[str, list[float]]) -> dict[str, dict[int, float]]:
    return {method: dict(enumerate(column)) for method, column in values.items()}


def test_the_best_is_bold_with_those_that_cannot_be_told_from_it() -> None:
    table = table_of(
        {
            "best": [0.100, 0.201, 0.300, 0.400, 0.501],
            "tied": [0.103, 0.199, 0.302, 0.399, 0.503],
            "worse": [0.500, 0.602, 0.699, 0.801, 0.900],
        }
    )
    found = standing(table, lower_is_better=True)
    assert (found.best, found.bold, found.left_out) == ("best", {"best", "tied"}, ())
    assert found.p_values["worse"] < 1e-6
    assert found.p_values["tied"] > 0.05
    assert best_rows(table, lower_is_better=True) == {"best", "tied"}
    assert best_rows(table, lower_is_better=False) == {"worse"}


def test_the_adjustment_is_over_all_pairs() -> None:
    rng = np.random.default_rng(5)
    table = table_of({name: list(rng.normal(mean, 1, 6)) for name, mean in (("a", 0), ("b", 1), ("c", 3), ("d", 3))})
    pairs = list(itertools.combinations(table, 2))
    adjusted = holm([stats.ttest_rel(list(table[i].values()), list(table[j].values())).pvalue for i, j in pairs])
    expected = {j: p for (i, j), p in zip(pairs, adjusted, strict=True) if i == "a"}
    assert standing(table, lower_is_better=True).p_values == pytest.approx(expected)


def test_nothing_is_bold_where_nobody_is_significantly_worse() -> None:
    # A clear order of the means, but from three seeds that scatter as much.
    noisy = table_of({"a": [0.1, 0.4, 0.2], "b": [0.3, 0.2, 0.6], "c": [0.5, 0.4, 0.9]})
    assert best_rows(noisy, lower_is_better=True) == set()
    assert standing(noisy, lower_is_better=True).best == "a"
    # One seed, differences without spread, one method, none.
    assert best_rows(table_of({"a": [0.0], "b": [9.0]}), lower_is_better=True) == set()
    assert best_rows(table_of({"a": [0.0, 1.0], "b": [9.0, 10.0]}), lower_is_better=True) == set()
    assert best_rows(table_of({"a": [0.0, 1.0]}), lower_is_better=True) == set()
    assert best_rows({}, lower_is_better=True) == set()


def test_a_method_without_one_of_the_seeds_is_left_out() -> None:
    table = table_of({"a": [0.1, 0.11, 0.13], "b": [0.9, 0.92, 0.91]})
    table["c"] = {0: 0.0, 1: 0.0}
    found = standing(table, lower_is_better=True)
    assert (found.left_out, found.bold) == (("c",), {"a"})


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_bold_rows_obey_their_rule(methods: int, seeds: int, seed: int, lower: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.integers(0, 3, methods)[:, None] * 20.0, 1, size=(methods, seeds)) + rng.normal(0, 5, seeds)
    table = table_of({f"m{i}": list(row) for i, row in enumerate(values)})
    found = standing(table, lower_is_better=lower)
    means = values.mean(1) if lower else -values.mean(1)
    assert found.best == f"m{means.argmin()}"
    worse = {method for method, p in found.p_values.items() if p <= 0.05}
    assert found.bold == (set(table) - worse if worse else set())
    # Neither the scale nor what is common to a seed nor the sign convention changes what is said.
    other = table_of({f"m{i}": list(-3 * row + np.arange(seeds)) for i, row in enumerate(values)})
    assert best_rows(other, lower_is_better=not lower) == found.bold


@pytest.mark.parametrize(
    ("seeds", "equal", "scales"),
    [
        (10, 8, [1] * 8),  # all are equal; tests of the luckiest against its competitors alone would be wrong in 11 %
        (3, 3, [1] * 5),  # three are equally good, two far worse
        (3, 5, [0.1, 1, 1, 5, 20]),  # equal in the mean, of very unequal spread
    ],
)
def test_the_probability_of_any_false_claim_is_at_most_alpha(seeds: int, equal: int, scales: list[float]) -> None:
    rng, repeats, wrong = np.random.default_rng(0), 500, 0
    for _ in range(repeats):
        values = rng.normal(size=(len(scales), seeds)) * np.array(scales)[:, None] + rng.normal(size=seeds)
        values[equal:] += 1e4
        found = standing(table_of({f"m{i}": list(row) for i, row in enumerate(values)}), lower_is_better=True)
        # A claim is wrong if one of the equally good methods is said to be worse than the best.
        wrong += bool(found.bold) and not {f"m{i}" for i in range(equal)} <= found.bold
    # Three standard deviations of a count with probability .05.
    assert wrong <= repeats * 0.05 + 3 * math.sqrt(repeats * 0.05 * 0.95)


def test_a_true_difference_is_found() -> None:
    rng, found = np.random.default_rng(1), 0
    for _ in range(100):
        common = rng.normal(size=5)
        table = {"good": list(common + rng.normal(0, 0.1, 5)), "bad": list(common + 1 + rng.normal(0, 0.1, 5))}
        found += best_rows(table_of(table), lower_is_better=True) == {"good"}
    assert found >= 95


# Records


def record(task: str, method: str, seed: int, nll: float | None, failed: bool = False) -> Record:
    row = None if failed else Row(metrics={"nll": nll})
    return Record(task, "classification", seed, method, {}, {}, raw=row, failed="an error" if failed else None)


def test_records_are_arranged_by_task_method_and_seed() -> None:
    records = [
        record("digits", "a", 0, 0.1),
        record("digits", "a", 1, 0.3),
        record("digits", "b", 0, 0.2),
        record("digits", "b", 1, None),
        record("digits", "c", 0, math.inf),
        record("digits", "d", 0, 0.2, failed=True),
        record("wine", "a", 0, 0.4),
    ]
    figure: Callable[[Record], float | None] = lambda one: one.raw.metrics["nll"] if one.raw else None  # noqa: E731
    table = by_task(records, figure)
    assert table == {"digits": {"a": {0: 0.1, 1: 0.3}, "b": {0: 0.2}}, "wine": {"a": {0: 0.4}}}
    assert task_means(table) == {"digits": {"a": pytest.approx(0.2)}, "wine": {"a": 0.4}}


# Ranks


def test_ranks_share_ties_and_put_the_best_first() -> None:
    scores = {"t1": {"a": 0.9, "b": 0.8, "c": 0.8}, "t2": {"a": 0.5, "b": 0.7, "c": 0.6}}
    found = average_ranks(scores, lower_is_better=False)
    assert found.ranks == {"t1": {"a": 1, "b": 2.5, "c": 2.5}, "t2": {"a": 3, "b": 1, "c": 2}}
    assert list(found.average.items()) == [("b", 1.75), ("a", 2.0), ("c", 2.25)]
    assert average_ranks(scores, lower_is_better=True).average == {"a": 2.0, "b": 2.25, "c": 1.75}


methods_present = st.lists(st.frozensets(st.sampled_from("abcde"), max_size=5), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(methods_present)
def test_the_part_that_is_ranked_is_the_largest_complete_one(rows: list[frozenset[str]]) -> None:
    scores = {f"t{i}": {method: float(ord(method)) for method in row} for i, row in enumerate(rows)}
    everyone = frozenset().union(*rows)
    sizes = [
        len(choice) * sum(set(choice) <= row for row in rows)
        for count in range(2, len(everyone) + 1)
        for choice in itertools.combinations(everyone, count)
    ]
    if not any(sizes):
        with pytest.raises(InputError, match="nothing to rank"):
            average_ranks(scores, lower_is_better=True)
        return
    found = average_ranks(scores, lower_is_better=True)
    assert found.matrix.size == max(sizes)
    assert all(set(row) == set(found.average) for row in found.ranks.values())
    assert set(found.ranks) | set(found.left_out_tasks) == set(scores)
    assert set(found.average) | set(found.left_out_methods) == everyone
    assert not set(found.ranks) & set(found.left_out_tasks)
    assert not set(found.average) & set(found.left_out_methods)


def test_what_is_left_out_is_named() -> None:
    full = dict.fromkeys("abc", 0.0)
    found = average_ranks({"t1": full, "t2": full, "t3": {"a": 0.0, "b": 1.0}}, lower_is_better=True)
    # Two methods on three tasks are as many figures as three on two: the more tasks.
    assert (found.left_out_tasks, found.left_out_methods) == ((), ("c",))
    found = average_ranks({"t1": full, "t2": full, "t3": full, "t4": {"a": 0.0, "b": 1.0}}, lower_is_better=True)
    assert (found.left_out_tasks, found.left_out_methods) == (("t4",), ())


def test_friedman_agrees_with_demsars_example() -> None:
    # His Table 6 (2006): four methods on 14 data sets, with the fourth digit where he ranks figures that look equal. He gives
    # average ranks of 3.143, 2.000, 2.893 and 1.964, and χ² = 9.28 without a correction for ties.
    rows = """.763 .768 .771 .798; .599 .591 .590 .569; .954 .971 .968 .967; .628 .661 .654 .657; .882 .888 .886 .898
        .936 .931 .916 .931; .661 .668 .609 .685; .583 .583 .563 .625; .775 .838 .866 .875; 1.0 1.0 1.0 1.0
        .940 .962 .965 .962; .619 .666 .614 .669; .972 .981 .9751 .975; .957 .978 .946 .970"""
    values = [[float(value) for value in row.split()] for line in rows.splitlines() for row in line.split(";")]
    scores = {f"t{i}": dict(zip("abcd", row, strict=True)) for i, row in enumerate(values)}
    ranks = average_ranks(scores, lower_is_better=False)
    assert ranks.average == pytest.approx({"d": 1.964, "b": 2.0, "c": 2.893, "a": 3.143}, abs=1e-3)
    found = friedman(ranks)
    plain = 12 * 14 / (4 * 5) * (sum(rank**2 for rank in ranks.average.values()) - 4 * 25 / 4)
    assert plain == pytest.approx(9.28, abs=0.01)
    assert found.chi_squared >= plain  # the correction for ties
    # The correction is that by which Iman and Davenport's statistic is the F of an analysis of variance of the ranks.
    within = ranks.matrix - ranks.matrix.mean(0) - ranks.matrix.mean(1, keepdims=True) + ranks.matrix.mean()
    between = 14 * ((ranks.matrix.mean(0) - 2.5) ** 2).sum() / 3
    assert found.f_statistic == pytest.approx(between / ((within**2).sum() / (3 * 13)))
    assert found.f_p_value is not None
    assert found.f_p_value < found.p_value < 0.05
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


def test_the_p_values_of_friedman_are_near_that_of_all_permutations() -> None:
    scores = {
        f"t{i}": dict(zip("abc", row, strict=True)) for i, row in enumerate([[1, 2, 3], [1, 3, 2], [2, 1, 3]] * 2)
    }
    found = friedman(average_ranks(scores, lower_is_better=True))
    orders = np.array(list(itertools.permutations([1, 2, 3])))
    sums = orders.copy()
    for _ in range(5):
        sums = (sums[:, None, :] + orders[None]).reshape(-1, 3)
    statistics = 12 / (6 * 3 * 4) * (sums**2).sum(1) - 3 * 6 * 4
    assert found.chi_squared == pytest.approx(4.0 * 12 / 12 * (8**2 + 12**2 + 16**2 - 3 * 12**2) / 24)
    exact = np.mean(statistics >= found.chi_squared - 1e-9)
    assert found.p_value == pytest.approx(exact, abs=0.03)
    assert found.f_p_value == pytest.approx(exact, abs=0.03)


def test_friedman_at_its_ends() -> None:
    agree = average_ranks({f"t{i}": {"a": 1.0, "b": 2.0, "c": 3.0} for i in range(4)}, lower_is_better=True)
    found = friedman(agree)
    assert (found.chi_squared, found.f_statistic, found.f_p_value) == (pytest.approx(8.0), None, None)
    equal = average_ranks({f"t{i}": {"a": 1.0, "b": 1.0, "c": 1.0} for i in range(4)}, lower_is_better=True)
    assert (friedman(equal).chi_squared, friedman(equal).p_value, friedman(equal).f_p_value) == (0, 1, 1)


@pytest.mark.parametrize(
    ("methods", "quantile"),
    [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)],
)
def test_the_critical_difference_is_that_of_demsars_table(methods: int, quantile: float) -> None:
    for tasks in (5, 30):
        expected = quantile * math.sqrt(methods * (methods + 1) / (6 * tasks))
        # The table cuts off at the third digit here and there: 2.3437 is its 2.343.
        assert critical_difference(methods, tasks) == pytest.approx(expected, rel=5e-4)
    assert critical_difference(methods, 10, 0.10) < critical_difference(methods, 10, 0.05)


def test_the_cliques_of_demsars_example() -> None:
    average = {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    # At the .10 level the critical difference is 1.12: C4.5 is worse than both that use m, and cf alone cannot be told.
    difference = critical_difference(4, 14, 0.10)
    assert cliques(average, difference) == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))
    assert cliques(average, 5.0) == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    assert cliques(average, 0.01) == ()
    assert cliques({"a": 1.0, "b": 2.0}, 1.0) == ()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=7), st.integers(1, 20))
def test_cliques_against_all_subsets(halves: list[int], twice: int) -> None:
    average = {f"m{i}": half / 2 for i, half in enumerate(halves)}
    difference = twice / 2 + 0.25
    alike = [
        frozenset(group)
        for count in range(2, len(average) + 1)
        for group in itertools.combinations(average, count)
        if max(average[m] for m in group) - min(average[m] for m in group) < difference
    ]
    maximal = {group for group in alike if not any(group < other for other in alike)}
    found = cliques(average, difference)
    assert len(found) == len(maximal)
    assert {frozenset(group) for group in found} == maximal


# Time to a given figure


def test_the_first_crossing_is_found_on_the_line_between_two_measurements() -> None:
    history = [(0.0, 2.0), (10.0, 1.0), (20.0, 0.5), (30.0, 0.8), (40.0, 0.4)]
    assert time_to_reach(history, 1.5) == 5.0
    assert time_to_reach(history, 1.0) == 10.0
    assert time_to_reach(history, 0.6) == pytest.approx(18.0)
    assert time_to_reach(history, 0.45) == pytest.approx(38.75)
    assert time_to_reach(history, 0.3) is None
    assert time_to_reach(history, 3.0) == 0.0
    assert time_to_reach([], 1.0) is None
    # Nothing is interpolated from a run that had diverged.
    assert time_to_reach([(0.0, 2.0), (1.0, math.nan), (2.0, 0.1)], 1.0) == 2.0
    assert time_to_reach([(1.0, math.inf), (2.0, 0.1)], 1.0) == 2.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=8), st.integers(0, 20))
def test_the_crossing_is_the_first_time_of_the_broken_line(points: list[tuple[int, int]], target: int) -> None:
    times = sorted({time for time, _ in points})
    history = [(float(time), float(value)) for time, (_, value) in zip(times, points, strict=False)]
    found = time_to_reach(history, float(target))
    xs, ys = [x for x, _ in history], [y for _, y in history]
    if found is None:
        assert min(ys) > target
        return
    assert np.interp(found, xs, ys) == pytest.approx(
        max(target, min(ys[0], target)) if found > xs[0] else ys[0], abs=1e-9
    )
    earlier = np.linspace(xs[0], found, 200)[:-1]
    if found > xs[0]:
        assert (np.interp(earlier, xs, ys) > target - 1e-9).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summary([]), "values are empty"),
        (lambda: summary([[1.0]]), r"one dimension, but have shape \(1, 1\)"),
        (lambda: summary([math.inf]), "infinite"),
        (lambda: paired([1.0, 2.0], [1.0]), "there are 2 of the first method and 1 of the second"),
        (lambda: paired([1.0, 2.0], [1.0, math.nan]), "values of the second method hold 1 NaN"),
        (lambda: paired([1.0, 2.0], [1.0, 3.0], level=95), r"level must be in \(0, 1\), but it is 95"),
        (lambda: paired([1.0], [1.0], test_to_train=-1), "test_to_train must be a ratio of at least 0, but it is -1"),
        (lambda: holm([0.5, 1.5]), r"p-values must be in \[0, 1\]"),
        (lambda: best_rows({"a": {0: math.nan}}, lower_is_better=True), "values of a hold 1 NaN"),
        (lambda: best_rows({}, lower_is_better=True, alpha=0), r"alpha must be in \(0, 1\)"),
        (lambda: average_ranks({"t": {"a": math.nan}}, lower_is_better=True), "a has nan on t"),
        (lambda: average_ranks({}, lower_is_better=True), "nothing to rank"),
        (lambda: friedman(average_ranks({"t": {"a": 0, "b": 1}}, lower_is_better=True)), "at least 3 methods"),
        (lambda: critical_difference(1, 5), "at least 2 methods"),
        (lambda: cliques({"a": 1.0}, math.inf), "positive and finite"),
        (lambda: time_to_reach([(1.0, 1.0), (0.5, 1.0)], 0.5), "order it by time"),
        (lambda: time_to_reach([(1.0, 1.0)], math.nan), "target must be a finite number"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
