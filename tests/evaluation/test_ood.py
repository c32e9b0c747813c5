"""Detection figures against brute force over pairs and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stfbnn.errors import InputError
from stfbnn.evaluation.ood import aupr, auroc, fpr_at_tpr, ood_metrics

# Few distinct values, so that ties are the rule.
scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores, scores)
def test_against_brute_force(inside: list[float], outside: list[float]) -> None:
    pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    found = ood_metrics(inside, outside)
    assert found.auroc == pytest.approx(np.mean(pairs))

    precision_sum, recall, best = 0.0, 0.0, None
    for threshold in sorted({*inside, *outside}, reverse=True):
        true, false = sum(o >= threshold for o in outside), sum(i >= threshold for i in inside)
        precision_sum += (true / len(outside) - recall) * true / (true + false)
        recall = true / len(outside)
        if best is None and recall >= 0.95:
            best = false / len(inside)
    assert found.aupr == pytest.approx(precision_sum)
    assert found.fpr_at_95_tpr == pytest.approx(best)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scores, scores)
def test_exchanging_the_sets_mirrors_the_area(inside: list[float], outside: list[float]) -> None:
    assert auroc(inside, outside) == pytest.approx(1 - auroc(outside, inside))


def test_perfect_and_useless_scores() -> None:
    perfect = ood_metrics([0.0, 0.1, 0.2], [0.3, 0.4])
    assert (perfect.auroc, perfect.aupr, perfect.fpr_at_95_tpr) == (1, 1, 0)
    useless = ood_metrics(np.ones(6), np.ones(2))
    assert (useless.auroc, useless.aupr, useless.fpr_at_95_tpr) == (0.5, 0.25, 1)


def test_threshold_at_the_exact_rate() -> None:
    # 19 of 20 strange examples lie above every ordinary one: 95 % exactly, at no false alarm.
    assert fpr_at_tpr(np.linspace(1, 2, 10), np.r_[np.linspace(3, 4, 19), 0.0]) == 0
    assert fpr_at_tpr(np.linspace(1, 2, 10), np.r_[np.linspace(3, 4, 19), 0.0], tpr=0.96) == 1


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([], [1.0], "scores inside are empty"),
        ([1.0], [np.nan], "scores outside hold 1 NaN"),
        ([np.inf], [1.0], "scores inside hold 1 infinite"),
        ([[1.0]], [1.0], r"one number an example, but have shape \(1, 1\)"),
    ],
)
def test_bad_input(inside: object, outside: object, message: str) -> None:
    for figure in (auroc, aupr, fpr_at_tpr, ood_metrics):
        with pytest.raises(InputError, match=message):
            figure(inside, outside)


def test_bad_rate() -> None:
    with pytest.raises(InputError, match="but it is 95"):
        fpr_at_tpr([0.0], [1.0], tpr=95)
