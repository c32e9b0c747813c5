"""Selective prediction against brute force over orders and thresholds, scikit-learn, and closed forms."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from stfbnn.errors import InputError
from stfbnn.evaluation.selective import (
    accuracy_rejection_curve,
    aurc,
    excess_aurc,
    risk_coverage_curve,
    selective_accuracy,
)

# Few distinct scores, so that ties are the rule.
ranked = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=40)
lossy = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=1, max_size=40)
few = st.lists(st.tuples(st.integers(0, 2), st.floats(0, 3)), min_size=1, max_size=6)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def columns(pairs: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    scores, errors = zip(*pairs, strict=True)
    return np.array(scores, dtype=float), np.array(errors, dtype=float)


def harmonic(count: int) -> float:
    return sum(1 / k for k in range(1, count + 1))


def orders_that_a_sort_could_give(scores: np.ndarray) -> list[tuple[int, ...]]:
    return [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order))
    ]


@quick
@given(few)
def test_area_is_the_mean_over_all_orders_of_equal_scores(pairs: list[tuple[int, float]]) -> None:
    scores, errors = columns(pairs)
    areas = [
        np.mean([np.mean(errors[list(order[:k])]) for k in range(1, len(order) + 1)])
        for order in orders_that_a_sort_could_give(scores)
    ]
    assert aurc(scores, errors) == pytest.approx(np.mean(areas))


@quick
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6), st.floats(0.01, 1))
def test_selective_accuracy_is_the_mean_over_all_orders_of_equal_scores(
    pairs: list[tuple[int, int]], coverage: float
) -> None:
    scores, errors = columns(pairs)
    size = next(k for k in range(1, len(errors) + 1) if k / len(errors) >= coverage)
    found = [1 - errors[list(order[:size])].mean() for order in orders_that_a_sort_could_give(scores)]
    assert selective_accuracy(scores, errors, coverage) == pytest.approx(np.mean(found))


@quick
@given(lossy)
def test_curve_against_every_threshold(pairs: list[tuple[int, float]]) -> None:
    scores, errors = columns(pairs)
    curve = risk_coverage_curve(scores, errors)
    answered = [scores <= threshold for threshold in sorted(set(scores))]
    assert curve.coverages == pytest.approx([np.mean(chosen) for chosen in answered])
    assert curve.risks == pytest.approx([errors[chosen].mean() for chosen in answered])
    assert curve.area == aurc(scores, errors)


@quick
@given(ranked)
def test_accuracies_are_the_precisions_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    scores, errors = columns(pairs)
    assume(errors.min() == 0)  # without one right answer scikit-learn has no recall, and warns
    precision, _, thresholds = precision_recall_curve(1 - errors, -scores, drop_intermediate=False)
    curve = accuracy_rejection_curve(scores, errors)
    assert curve.accuracies == pytest.approx(precision[: len(thresholds)])
    assert curve.rejections == pytest.approx([np.mean(-scores < threshold) for threshold in thresholds])


@quick
@given(lossy, st.randoms(use_true_random=False))
def test_order_of_examples_and_scale_of_scores_change_nothing(pairs: list[tuple[int, float]], random: object) -> None:
    scores, errors = columns(pairs)
    mixed = list(pairs)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    other_scores, other_errors = columns(mixed)
    expected, found = risk_coverage_curve(scores, errors), risk_coverage_curve(np.exp(other_scores) - 7, other_errors)
    assert found.coverages == expected.coverages
    assert found.risks == pytest.approx(expected.risks)
    assert found.area == pytest.approx(expected.area)
    assert excess_aurc(np.sqrt(other_scores), other_errors) == pytest.approx(excess_aurc(scores, errors), abs=1e-12)
    wrong, other_wrong = errors > 2, other_errors > 2
    assert selective_accuracy(other_scores**3, other_wrong, 0.3) == pytest.approx(
        selective_accuracy(scores, wrong, 0.3)
    )
    assert accuracy_rejection_curve(scores, wrong) == accuracy_rejection_curve(5 * other_scores, other_wrong)


@quick
@given(lossy)
def test_no_ranking_beats_the_best_one_nor_falls_below_the_worst(pairs: list[tuple[int, float]]) -> None:
    scores, errors = columns(pairs)
    best, worst = aurc(errors, errors), aurc(-errors, errors)
    assert best - 1e-12 <= aurc(scores, errors) <= worst + 1e-12
    assert excess_aurc(scores, errors) == pytest.approx(aurc(scores, errors) - best, abs=1e-12)
    assert excess_aurc(errors, errors) == 0


def test_area_is_the_sum_of_errors_weighted_by_harmonic_numbers() -> None:
    # Error i is in the means over k = i … N, each time with weight 1/k.
    errors = np.random.default_rng(0).exponential(size=50)
    weights = [(harmonic(50) - harmonic(i - 1)) / 50 for i in range(1, 51)]
    assert aurc(np.arange(50.0), errors) == pytest.approx(np.dot(weights, errors))


def test_perfect_ranking_has_the_closed_form_and_no_excess() -> None:
    right, wrong = 70, 30
    errors = np.repeat([0, 1], [right, wrong])
    # Σ over k of (k − right)/k for the k beyond the right ones.
    expected = (wrong - right * (harmonic(100) - harmonic(right))) / 100
    assert aurc(np.arange(100.0), errors) == pytest.approx(expected)
    assert excess_aurc(np.arange(100.0), errors) == pytest.approx(0, abs=1e-12)
    assert selective_accuracy(np.arange(100.0), errors, 0.7) == 1
    assert selective_accuracy(np.arange(100.0), errors, 0.8) == pytest.approx(70 / 80)


def test_best_area_tends_to_the_published_approximation() -> None:
    errors = np.repeat([0, 1], [9000, 1000])
    assert aurc(errors, errors) == pytest.approx(0.1 + 0.9 * np.log(0.9), rel=0.01)


def test_a_score_that_knows_nothing_has_the_risk_as_area() -> None:
    errors = np.repeat([0.0, 1.0, 4.0], [30, 10, 10])
    assert aurc(np.full(50, 3.2), errors) == pytest.approx(1)
    # In expectation over all rankings too: 4,000 random ones, four standard errors.
    generator = np.random.default_rng(1)
    areas = [aurc(generator.random(50), errors) for _ in range(4000)]
    assert np.mean(areas) == pytest.approx(1, abs=4 * np.std(areas) / np.sqrt(4000))


def test_coverage_is_met_exactly_where_rounding_could_add_an_example() -> None:
    errors = np.repeat([0, 1], [7, 93])
    assert 0.07 * 100 > 7
    assert selective_accuracy(np.arange(100.0), errors, 0.07) == 1
    assert selective_accuracy(np.arange(100.0), errors, 0.0701) == pytest.approx(7 / 8)
    assert selective_accuracy(np.arange(100.0), errors, 1e-12) == 1


def test_booleans_arrays_tensors_and_lists_are_the_same() -> None:
    scores, wrong = [0.1, 0.4, 0.4, 0.9], [False, True, False, True]
    expected = risk_coverage_curve(scores, [0.0, 1.0, 0.0, 1.0])
    assert expected.coverages == (0.25, 0.75, 1.0)
    assert expected.risks == pytest.approx((0, 1 / 3, 1 / 2))
    for errors in (wrong, np.array(wrong), torch.tensor(wrong), torch.tensor(wrong).int()):
        assert risk_coverage_curve(torch.tensor(scores), errors) == expected


@quick
@given(lossy, st.integers(2, 12))
def test_thinning_keeps_points_of_the_curve_with_its_ends_and_its_area(
    pairs: list[tuple[int, float]], points: int
) -> None:
    curve = risk_coverage_curve(*columns(pairs))
    thin = curve.at_most(points)
    whole = list(zip(curve.coverages, curve.risks, strict=True))
    kept = list(zip(thin.coverages, thin.risks, strict=True))
    assert kept == [point for point in whole if point in kept]
    assert len(kept) == len(whole) if len(whole) <= points else 2 <= len(kept) <= points
    assert (kept[0], kept[-1], thin.area) == (whole[0], whole[-1], curve.area)


def test_thinned_points_are_evenly_spread_and_fit_in_json() -> None:
    generator = np.random.default_rng(2)
    scores, errors = generator.random(1000), generator.random(1000) < 0.3
    thin = risk_coverage_curve(scores, errors).at_most(11)
    assert thin.coverages == pytest.approx([0.001, *np.linspace(0.1, 1, 10)], abs=1.01e-3)
    rejection = accuracy_rejection_curve(scores, errors).at_most(11)
    assert rejection.rejections == pytest.approx(1 - np.array(thin.coverages[::-1]), abs=2.01e-3)
    assert rejection.accuracies[0] == pytest.approx(1 - errors.mean())
    assert json.loads(json.dumps(asdict(thin)))["coverages"] == list(thin.coverages)


@pytest.mark.parametrize(
    ("scores", "errors", "message"),
    [
        ([], [], "are empty"),
        ([1.0, np.nan], [0, 1], "scores hold 1 NaN"),
        ([1.0, 2.0], [0, np.inf], "errors hold 1 infinite"),
        ([1.0, 2.0], [0, -1], "errors must not be negative, but the smallest is -1"),
        ([1.0, 2.0], [0, 1, 1], "shapes must agree exactly"),
        ([[1.0], [2.0]], [[0], [1]], r"one number an example, but have shape \(2, 1\)"),
    ],
)
def test_bad_input(scores: object, errors: object, message: str) -> None:
    for figure in (risk_coverage_curve, accuracy_rejection_curve, aurc, excess_aurc):
        with pytest.raises(InputError, match=message):
            figure(scores, errors)
    with pytest.raises(InputError, match=message):
        selective_accuracy(scores, errors, 0.5)


def test_an_accuracy_needs_errors_of_0_and_1() -> None:
    with pytest.raises(InputError, match=r"must be 0 \(right\) or 1 \(wrong\)"):
        accuracy_rejection_curve([1.0, 2.0], [0, 0.5])
    with pytest.raises(InputError, match=r"must be 0 \(right\) or 1 \(wrong\)"):
        selective_accuracy([1.0, 2.0], [0, 2], 0.5)


@pytest.mark.parametrize("coverage", [0, -0.1, 1.01, 80, float("nan")])
def test_a_coverage_is_a_share(coverage: float) -> None:
    with pytest.raises(InputError, match="coverage must be a share"):
        selective_accuracy([1.0], [0], coverage)


def test_a_curve_has_two_ends() -> None:
    with pytest.raises(InputError, match="at least 2 points"):
        risk_coverage_curve([1.0, 2.0], [0, 1]).at_most(1)
